"""The DeepSpeed training loop. Only this file imports deepspeed, and only after the device is known.

In: batches from one or more caches, a model, and a `DistillConfig`. Out: trained weights, metrics, checkpoints.
Invariant: teachers and their tails are outside the engine's module tree, so they are not trained, partitioned or saved.
A step's samples, BatchNorm groups and random numbers depend only on the seed and the step. Nothing synchronizes with
the device between logged steps.
"""

import atexit
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.devices import deepspeed_device, memory_errors, set_launcher_variables
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.models.normalize import Normalize, student_input
from scalekd_cache.models.student import Student, StudentOutput
from scalekd_cache.models.tail import Tail
from scalekd_cache.progress import progress
from scalekd_cache.scalekd.losses import FeatureTerms, HeadOutputs, LossTerms, Targets, losses_of_teachers
from scalekd_cache.training.checkpoint import AVERAGE, MODEL, OPTIMIZER, STUDENT, Checkpoint, commit_checkpoint
from scalekd_cache.training.optim import deepspeed_config, make_optimizer, make_schedule, scaled_lr, schedule_step
from scalekd_cache.training.run_folder import RunFolder
from scalekd_cache.training.targets import TargetSource
from scalekd_cache.training.watchdog import BACKEND_TIMEOUTS, Watchdog
from scalekd_cache.training.zero_state import gather_state, gather_weights, scatter_state

SIGNAL_S = 10.0
"""Ranks exchange signals at every logged step, and also in between if logged steps are more than this many seconds
apart."""
LESS_MEMORY = (
    "set student.grad_checkpointing=true; use --heads lite, --heads linear (no attention, no tail) or --zero 2; "
    "or lower train.micro_batch_size, which is also the BatchNorm group size"
)


class Spent(NamedTuple):
    """Time that a run has taken so far, in seconds."""

    total_s: float
    """Since its first step, including evaluations and checkpoints."""
    steps_s: float
    """Training steps only."""


class StepLosses(NamedTuple):
    """A micro-batch's losses."""

    terms: LossTerms
    """The minimized terms. With multiple teachers, the feature terms are weighted sums over the teachers."""
    teachers: Tensor
    """(T, 5) float32: each teacher's feature terms (`FeatureTerms`) if T >= 2; (0, 5) with one teacher."""

    @property
    def total(self) -> Tensor:
        """The training loss."""
        return self.terms.total


class DistillModel(nn.Module):
    """The model to train: the student, and ScaleKD heads for each teacher. Without targets, there are no heads."""

    def __init__(self, config: DistillConfig, student: Student, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.heads = nn.ModuleList(heads)
        self.normalize = Normalize(config.student.mean, config.student.std, folded=True)

    def compile_parts(self) -> None:
        """Compile the student model and the heads in place, without changing parameter names."""
        self.student.model.compile()
        for heads in self.heads:
            heads.compile()

    def forward(self, images: Tensor, labels: Tensor, targets: Sequence[Targets], tails: Sequence[Tail]) -> StepLosses:
        """Losses for one micro-batch: uint8 images (B, 3, H, W), int64 labels (B,), and each teacher's targets."""
        output = self.student(self.prepare(images))
        given: list[tuple[HeadOutputs | None, Targets]] = []
        for number, (one, tail) in enumerate(zip(targets, tails, strict=True)):
            maps = self.project(output, number, len(one.features), tail, all_pooled=one.pooled is not None)
            given.append((maps, one))
        scalekd, train = self.config.scalekd, self.config.train
        terms, own = losses_of_teachers(scalekd, train, output.logits, labels, given)
        apart = [torch.stack(one).detach() for one in own] if len(own) > 1 else []
        return StepLosses(terms, torch.stack(apart) if apart else terms.label.new_zeros(0, len(FeatureTerms._fields)))

    def project(
        self, output: StudentOutput, number: int, featured: int, tail: Tail, *, all_pooled: bool = False
    ) -> HeadOutputs:
        """Project the student's maps to one teacher, for the first `featured` samples, which have target features.
        With `all_pooled`, the pooled output covers all samples."""
        embedding = self.student.pooled(output)[: None if all_pooled else featured]
        outputs: HeadOutputs = self.heads[number](output.s3[:featured], output.s4[:featured], tail, embedding)
        return outputs

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the student's normalized input."""
        return student_input(images, self.student.image_size, self.normalize)


def start_processes(process: Process, timeout_minutes: float = 30.0) -> None:
    """Initialize torch.distributed, even for a single process. A collective that times out ends the run.

    Raises:
        UserError: DeepSpeed uses a different device.
    """
    deepspeed_accelerator(process.device)
    import deepspeed

    # On a CPU, DeepSpeed would spend a minute compiling an operator that only tensor-parallel inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    set_launcher_variables(process.device)
    hook = sys.excepthook
    deepspeed.init_distributed(
        dist_backend="nccl" if process.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=BACKEND_TIMEOUTS * timeout_minutes),
    )
    if process.world_size == 1:
        sys.excepthook = hook  # torch's adds the rank to every line of a traceback
    atexit.register(_end_processes)


def _end_processes() -> None:
    """Release torch.distributed when the process ends; NCCL warns otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """A 64-bit seed for the random numbers in a micro-batch."""
    return ((seed * 1_000_003 + step) * 65_536 + micro) % 2**64


@contextmanager
def single_value_errors(micro_batch: int) -> Iterator[None]:
    """Context manager for a training step that turns PyTorch's BatchNorm error about a single value per channel into a
    `UserError`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # PyTorch has no specific error class for it
            raise
        raise UserError(
            "batch normalization needs more than one value per channel",
            got=f"train.micro_batch_size={micro_batch}, and feature maps of 1 x 1",
            fix="set --batch and --train.micro_batch_size to 2 or more, or use larger views",
        ) from error


def deepspeed_accelerator(device: torch.device) -> Any:
    """DeepSpeed's accelerator, which DeepSpeed chooses on import, once per process.

    Raises:
        UserError: DeepSpeed already uses a different device type in this process.
    """
    with deepspeed_device(device):
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    if accelerator.device_name() != device.type:
        raise UserError(
            "DeepSpeed is already using a different device in this process",
            got=accelerator.device_name(),
            expected=device.type,
            fix=f"start a new process; set DS_ACCELERATOR={device.type} if your code imports deepspeed first",
        )
    return accelerator


class Trainer:
    """A training run: the DeepSpeed engine, the frozen tails, the targets and the schedule."""

    def __init__(
        self,
        config: DistillConfig,
        process: Process,
        loader: CacheLoader,
        model: DistillModel,
        tails: Sequence[Tail],
        targets: Sequence[TargetSource],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Build the engine. A checkpoint may come from any world size and ZeRO stage.

        Args:
            config: the run's options.
            process: this process.
            loader: loads batches from the caches.
            model: the student, with heads for each of `targets`.
            tails: each teacher's frozen tail.
            targets: the source of each teacher's targets (empty: train on labels only).
            checkpoint: the checkpoint to resume from.
        """
        self.config = config
        self.process = process
        self.loader = loader
        self.model = model.to(process.device)
        self.tails = tails
        self.targets = targets
        names = [source.name for source in targets] if len(targets) > 1 else []
        self._columns = [*LossTerms._fields, *(f"{one}/{term}" for one in names for term in FeatureTerms._fields)]
        self.watchdog = Watchdog(process, loader)
        self._signal_steps, self._agree_now = 1, True
        facts = {} if checkpoint is None else checkpoint.facts
        total_s = float(facts.get("seconds", 0))
        self._earlier = Spent(total_s, float(facts.get("steps_seconds", total_s)))
        self._started: float | None = None
        self._paused_s = 0.0
        self._paused_at: float | None = None
        lr = scaled_lr(config)
        # Load weights and create the moving average before the engine, which may partition the weights.
        if checkpoint is not None:
            self._resume_weights(checkpoint)
        ema = config.train.ema_decay
        self.ema = ModelEmaV3(model.student.model, decay=ema) if ema else None
        optimizer = make_optimizer(model, config.optim, lr)
        torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
        if config.train.compile:  # after the moving average, which copies the model
            model.compile_parts()
        self.schedule = make_schedule(optimizer, config.optim, lr, loader.total_steps, loader.steps_per_epoch)
        with memory_errors(LESS_MEMORY):
            self.engine = self._initialize(model, optimizer)
        if config.train.channels_last:  # not before the engine is built: its broadcast would fail
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if checkpoint is not None:
            self._resume_optimizer(checkpoint)

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        import deepspeed

        options = deepspeed_config(self.config, self.process)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
        if self._alone():
            engine.enable_backward_allreduce = False  # it would copy every gradient twice
        return engine

    def _alone(self) -> bool:
        """Whether the gradients need no reduction: one process at ZeRO 0."""
        return self.process.world_size == 1 and self.config.train.zero == 0

    def _add_missing_gradients(self) -> None:
        """Give parameters without a gradient a zero gradient, as DeepSpeed's reduction does."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def train(self, folder: RunFolder | None) -> Iterator[int]:
        """Train from the loader's position to the end, yielding the number of finished steps after each step."""
        first, per_epoch, total = self.loader.step, self.loader.steps_per_epoch, self.loader.total_steps
        self._started = time.perf_counter()
        batches = iter(self.loader)
        sums, waited, started, steps = [0.0] * len(self._columns), 0.0, time.perf_counter(), 0
        bar = progress("distill", total, "step", rank=self.process.rank, initial=first)
        for step in range(first, total):
            self.watchdog.start_step(step)
            with memory_errors(LESS_MEMORY), single_value_errors(self.config.train.micro_batch_size):
                terms, wait = self._step(step, batches)
            waited, steps = waited + wait, steps + 1
            sums = [a + b for a, b in zip(sums, terms, strict=True)]
            self._agree_now = self._is_logged(step) or (step + 1) % self._signal_steps == 0
            if self._is_logged(step):
                values = self._average(sums, steps)
                seconds = time.perf_counter() - started  # the device has finished these steps
                values |= {"epoch": step // per_epoch, "lr": self._lr()}
                values["images_per_s"] = steps * self.config.train.global_batch_size / seconds
                values["data_wait"] = waited / seconds
                self._check_finite(step, values)
                self._signal_steps = max(1, int(SIGNAL_S * steps / self._max_over_ranks(seconds)))
                shown = f"loss={values['loss']:.3f}, wait={values['data_wait']:.0%}{self._gpu_memory()}"
                bar.set_postfix_str(shown, refresh=False)  # a log gets one line every 15 s, not one per logged step
                if folder is not None:
                    folder.log(step + 1, values)
                sums, waited, started, steps = [0.0] * len(sums), 0.0, time.perf_counter(), 0
            bar.update()
            self._paused_at = time.perf_counter()
            yield step + 1
            pause, self._paused_at = time.perf_counter() - self._paused_at, None
            started, self._paused_s = started + pause, self._paused_s + pause
        self._paused_at = time.perf_counter()
        bar.close()

    def close(self) -> None:
        """Free the engine's memory. At ZeRO 1 and 2, DeepSpeed's hooks otherwise keep it until the process ends."""
        self.engine.destroy()

    def spent(self) -> Spent:
        """The time so far. Earlier sessions count up to their last checkpoint."""
        now = time.perf_counter()
        total_s = 0.0 if self._started is None else now - self._started
        paused_s = self._paused_s + (0.0 if self._paused_at is None else now - self._paused_at)
        return Spent(self._earlier.total_s + total_s, self._earlier.steps_s + total_s - paused_s)

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[Tensor, float]:
        """Run one optimizer step. Returns the mean of each loss term over this rank's micro-batches, and the data wait
        in seconds."""
        self.schedule.step_update(schedule_step(self.config.optim, step, self.loader.steps_per_epoch))
        wait, rows = 0.0, []
        for micro in self.loader.micros:
            asked = time.perf_counter()
            with self.watchdog.pause_timeout() if self.config.follow else nullcontext():
                batch = next(batches)
            wait += time.perf_counter() - asked
            batch = batch.to(self.process.device)
            torch.manual_seed(micro_batch_seed(self.config.train.seed, step, micro))
            targets = [source(batch) for source in self.targets]
            losses = self.engine(batch.images, batch.labels, targets, self.tails)
            self.engine.backward(losses.total)
            if self._alone():
                self._add_missing_gradients()
            self.engine.step()
            rows.append(torch.cat([torch.stack([term.detach() for term in losses.terms]), losses.teachers.flatten()]))
            self.watchdog.micro_batch_done(step, micro, batch, rows[-1])
        if self.ema is not None:
            self.ema.update(self.model.student.model, step)
        return torch.stack(rows).mean(0), wait

    def _is_logged(self, step: int) -> bool:
        """Whether the loss is read after this step. The last step of an epoch is included, so that NaN never reaches a
        checkpoint."""
        return (step + 1) % self.config.train.log_every == 0 or (step + 1) % self.loader.steps_per_epoch == 0

    def _gpu_memory(self) -> str:
        device = self.process.device
        return f", gpu={torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""

    def _lr(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def _average(self, sums: list[Any], steps: int) -> dict[str, float]:
        """The mean terms per step, averaged over ranks."""
        means = torch.stack([torch.as_tensor(value, device=self.process.device) for value in sums]) / steps
        dist.all_reduce(means)
        means /= self.process.world_size
        values = dict(zip(self._columns, means.tolist(), strict=True))
        return {"loss": sum(values[name] for name in LossTerms._fields), **values}

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if value != value or abs(value) == float("inf")]
        first = self.watchdog.first_nonfinite()
        if bad or first is not None:
            got = ", ".join(f"{name}={values[name]}" for name in bad) or "a micro-batch's loss"
            raise diverged(got, first or f"step {step + 1}")

    def signal_of_any_rank(self, received: int, *, now: bool = False) -> int:
        """The signal received by any rank (0: none). The result is the same on all ranks, so they stop at the same
        step.

        With multiple ranks, signals are exchanged at logged steps, where the ranks synchronize anyway, and every
        `SIGNAL_S` seconds in between. With `now`, they are exchanged immediately.
        """
        if self.process.world_size == 1:
            return received
        return int(self._max_over_ranks(received)) if now or self._agree_now else 0

    def true_on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, with the same result on all ranks."""
        return self._max_over_ranks(flag) > 0

    def range_over_ranks(self, number: float) -> tuple[float, float]:
        """The minimum and the maximum over all ranks."""
        return -self._max_over_ranks(-number), self._max_over_ranks(number)

    def wait_for_all_ranks(self) -> None:
        """Wait until every rank has made this call. `dist.barrier` would warn that it guesses the GPU."""
        self._max_over_ranks(0.0)

    def _max_over_ranks(self, number: float) -> float:
        """The maximum over all ranks. Synchronizes with the device."""
        if self.process.world_size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def student_state(self) -> dict[str, Tensor]:
        """The student's full state dict on the CPU, the same on every rank.

        The moving average is used if there is one. BatchNorm statistics are averaged across ranks.
        """
        return self._full_state(self.ema.module if self.ema is not None else self.model.student.model)

    def heads_state(self) -> dict[str, Tensor]:
        """The full state dict of all heads, as in `student_state`; empty without heads."""
        return self._full_state(self.model.heads)

    @torch.no_grad()
    def _full_state(self, module: nn.Module) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=self.config.train.zero == 3):
            state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        for name, _ in module.named_buffers():
            if name in state and state[name].is_floating_point():
                dist.all_reduce(state[name])
                state[name] /= self.process.world_size
        return {name: value.cpu() for name, value in state.items()}

    def save(self, folder: Path) -> None:
        """Commit a checkpoint for this step and remove the oldest ones beyond `keep_checkpoints` (`checkpoint.py`).

        Raises:
            UserError: weights are NaN or Inf, or the disk is full. Earlier checkpoints remain.
        """
        zero, device, module = self.config.train.zero, self.process.device, self.model
        self.watchdog.progressed()
        weights = gather_weights(self.engine, module, zero, device)
        bad = [name for name, value in weights.items() if not value.isfinite().all()]
        if bad:
            got = f"{counted(len(bad), 'weight tensor')} with NaN or Inf, first {bad[0]}"
            raise diverged(got, self.watchdog.first_nonfinite() or f"step {self.loader.step}")
        tensors, numbers, counts = gather_state(self.engine, module, zero, device)
        files = {STUDENT: self.student_state(), MODEL: {**weights, **self._statistics(module)}, OPTIMIZER: tensors}
        if self.ema is not None:
            files[AVERAGE] = {**self.ema.module.state_dict(), **self._statistics(self.ema.module)}
        self.watchdog.progressed()
        if self.process.rank == 0:
            facts: dict[str, Any] = {"loader": self.loader.state_dict(), "numbers": numbers, "counts": counts}
            facts["seconds"], facts["steps_seconds"] = (round(value, 3) for value in self.spent())
            commit_checkpoint(folder, self.loader.step, files, facts, self.config.train.keep_checkpoints)

    def _statistics(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's buffers, with BatchNorm statistics averaged over ranks."""
        saved = module.state_dict().keys()
        buffers = {name: value.detach().clone() for name, value in module.named_buffers() if name in saved}
        for value in buffers.values():
            if value.is_floating_point():
                dist.all_reduce(value)
                value /= self.process.world_size
        return {name: value.cpu() for name, value in buffers.items()}

    def _resume_weights(self, checkpoint: Checkpoint) -> None:
        """Restore the position, weights and statistics. Called before the engine partitions the weights."""
        self.loader.load_state_dict(checkpoint.facts["loader"])
        self.model.load_state_dict(checkpoint.tensors(MODEL))

    def _resume_optimizer(self, checkpoint: Checkpoint) -> None:
        tensors, facts = checkpoint.tensors(OPTIMIZER), checkpoint.facts
        scatter_state(self.engine, self.model, self.config.train.zero, tensors, facts["numbers"], facts["counts"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.tensors(AVERAGE))


def diverged(got: str, where: str) -> UserError:
    """The error for a run that diverged."""
    return UserError(
        "the loss or the weights became NaN or Inf",
        got=got,
        where=where,
        fix="lower optim.lr or set optim.clip_norm, and use a different --run; this run's checkpoints are intact",
    )
