"""How much memory does activation checkpointing save, and how much time does it cost?

    python -m benchmarks.training.activation_checkpointing [--batch 16]

Counted: the peak of all tensors in one step of student, heads and Swin-L's tail (`planning/step.py`, meta device).
Measured: peak memory of a process that runs two steps of the student without heads at 224 px in float32, minus that of
a process that only builds it; and the time of the second step. Prints a Markdown table.
"""

import argparse
import time

import torch

from benchmarks.harness import argument_parser, peak_memory_bytes, run_python
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import meta_teacher
from scalekd_cache.planning.step import step_memory

STUDENTS = ("resnet50", "vit_small")
TEACHER = "swin_large_patch4_window7_224"


def steps(name: str, on: bool, batch: int, count: int) -> tuple[float, float]:
    """Seconds of the last of `count` steps, and this process's peak memory in bytes."""
    torch.set_num_threads(1)
    student = build_student(StudentConfig(name=name, grad_checkpointing=on), num_classes=1000, image_size=224)
    seconds = 0.0
    for _ in range(count):
        begin = time.process_time()
        output = student(torch.zeros(batch, 3, 224, 224))
        (output.s3.mean() + output.s4.mean() + output.logits.mean()).backward()
        seconds = time.process_time() - begin
    return seconds, float(peak_memory_bytes())


def measured(name: str, on: bool, batch: int) -> tuple[float, float]:
    """Seconds per step, and peak memory in bytes above that of the bare model; each in a separate process."""
    found = []
    for count in (0, 2):
        module = ("-m", "benchmarks.training.activation_checkpointing")
        output = run_python(*module, "--one", name, str(int(on)), str(batch), str(count))
        found.append([float(word) for word in output.split()])
    return found[1][0], found[1][1] - found[0][1]


def counted(name: str, on: bool, batch: int) -> float:
    """Peak bytes of a step with heads and tail, without weights and their gradients."""
    config = DistillConfig(
        student=StudentConfig(name=name, grad_checkpointing=on),
        train=TrainConfig(micro_batch_size=batch, global_batch_size=batch),
    )
    with torch.device("meta"):
        return step_memory(config, meta_teacher(TEACHER, 224, 1000), 224, 1000)["activations"]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*steps(options.one[0], options.one[1] == "1", int(options.one[2]), int(options.one[3])))
        return
    print(f"batch of {options.batch}, float32")
    print("| student | checkpointing | student, heads, tail: counted peak | student only: peak | CPU s per step |")
    print("|---|---|---|---|---|")
    for name in STUDENTS:
        for on in (False, True):
            kept, (seconds, peak) = counted(name, on, options.batch), measured(name, on, options.batch)
            print(f"| {name} | {'on' if on else 'off'} | {kept / 1e6:,.0f} MB | {peak / 1e6:,.0f} MB | {seconds:.1f} |")


if __name__ == "__main__":
    main()
