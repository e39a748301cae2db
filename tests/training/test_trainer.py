"""The trainer: steps, losses, checkpoints, ZeRO stages, errors."""

import dataclasses
import gc
import itertools
import json
import math
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file
from small_cache import CPU
from small_trainer import STEPS, Lines, config_of, finish, trainer_of
from torch import nn

from scalekd_cache.config.base import to_plain
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.training.checkpoint import MODEL, OPTIMIZER, STUDENT, latest_checkpoint
from scalekd_cache.training.run_export import consolidated_student
from scalekd_cache.training.run_folder import RunFolder
from scalekd_cache.training.trainer import micro_batch_seed, start_processes


@pytest.fixture(scope="session")
def processes():
    start_processes(CPU)


@pytest.mark.parametrize("seed", [0, 7, 2**28, 2**31 - 1, 2**32 - 1, 2**63 - 1])
def test_every_seed_has_random_numbers(seed):
    first, second = (micro_batch_seed(seed, step, 5) for step in (3, 4))
    assert first != second
    torch.manual_seed(first)
    torch.manual_seed(second)
    assert seed > 2**28 or first == (seed * 1_000_003 + 3) * 65_536 + 5  # as in earlier versions


def test_one_process_reduces_no_gradients(processes):
    """DeepSpeed's reduction would copy them twice; the weights are the same, also of a parameter without gradient."""
    trainers = [trainer_of(config_of(optim={"weight_decay": 0.1})) for _ in range(2)]
    for trainer in trainers:
        trainer.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        trainer.engine.optimizer.add_param_group({"params": [trainer.model.unused], "weight_decay": 0.1})
    assert not trainers[0].engine.enable_backward_allreduce
    trainers[1].engine.enable_backward_allreduce = True
    for trainer in trainers:
        finish(trainer)
    reduced, own = (trainer.model.state_dict() for trainer in reversed(trainers))
    assert all(torch.equal(value, own[name]) for name, value in reduced.items())
    assert own["unused"][0] < 1


@pytest.mark.parametrize("zero", [0, 1, 2])  # DeepSpeed 0.19.8 keeps an engine of ZeRO 3
def test_a_closed_trainer_frees_its_engine(processes, zero):
    trainer = trainer_of(config_of(train={"zero": zero, "epochs": 1}))
    finish(trainer)
    engine = weakref.ref(trainer.engine)
    trainer.close()
    del trainer
    gc.collect()
    assert engine() is None


def test_training(processes, tmp_path):
    """One run: the student changes, the tail does not, and nothing frozen is saved."""
    trainer = trainer_of(config_of(optim={"warmup_epochs": 1}))
    before = trainer.student_state()
    tail_before = {name: value.clone() for name, value in trainer.tails[0].state_dict().items()}
    lines, steps = Lines(), []
    for step in trainer.train(lines):
        steps.append(step)
        assert trainer.loader.step == step
    trainer.save(tmp_path / "checkpoints")
    assert steps == list(range(1, 2 * STEPS + 1))
    assert lines.steps == list(range(1, 2 * STEPS + 1))
    assert lines.column("epoch") == [0] * STEPS + [1] * STEPS
    expected = [0.0, 1e-3 / 3, 2e-3 / 3] + [5e-4 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert lines.column("lr") == pytest.approx(expected)
    terms = [name for name in lines.lines[0] if name not in ("epoch", "lr", "loss", "images_per_s", "data_wait")]
    assert len(terms) == 7
    for line in lines.lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
        assert 0 <= line["data_wait"] <= 1
    assert lines.column("loss")[-1] < lines.column("loss")[0]

    after = trainer.student_state()
    assert all(
        not torch.equal(before[name], after[name]) for name in after if name.endswith(("conv1.weight", "fc.bias"))
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.tails[0].parameters())
    assert all(torch.equal(value, trainer.tails[0].state_dict()[name]) for name, value in tail_before.items())

    trained = set(trainer.engine.module.state_dict())
    assert {name.partition(".")[0] for name in trained} == {"student", "heads"}
    assert not [name for name in trained if "tail" in name or "teacher" in name]
    frozen = {tuple(value.shape): value for value in tail_before.values() if value.ndim > 1}
    folder = tmp_path / "checkpoints" / f"step-{2 * STEPS:08d}"
    saved = load_file(folder / MODEL)
    assert set(saved) == trained
    optimizer = load_file(folder / OPTIMIZER)
    assert {name.partition("/")[2] for name in optimizer} == {name for name, _ in trainer.model.named_parameters()}
    for value in (*saved.values(), *optimizer.values()):
        assert tuple(value.shape) not in frozen or not torch.equal(value, frozen[tuple(value.shape)])
    student = load_file(folder / STUDENT)
    assert student.keys() == after.keys()
    assert all(torch.equal(student[name], after[name]) for name in after)
    plain = consolidated_student(trainer.config.student, after, 10, 64)
    assert not plain.training


def test_an_accumulated_gradient_is_the_mean_over_micro_batches(processes):
    """One SGD step on two micro-batches equals the same step computed by hand."""
    config = config_of(
        optim={"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}, train={"targets": "none"}
    )
    trainer = trainer_of(config)
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    batches = list(trainer.loader)[:2]
    trainer.loader.step = 0
    steps = trainer.train(Lines())
    original = trainer._step

    def only_one(step, iterator):
        if step == 1:
            raise InterruptedError
        return original(step, iterator)

    trainer._step = only_one
    with pytest.raises(InterruptedError):
        list(steps)
    moved = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    by_hand = trainer_of(config).model
    for batch in batches:
        (by_hand(batch.images, batch.labels, [], []).total / 2).backward()
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(parameter.detach(), start[name])
        torch.testing.assert_close(moved[name], start[name] - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_on_a_cpu(processes):
    trainer = trainer_of(config_of(train={"precision": "bfloat16", "epochs": 1}))
    seen = []
    trainer.model.student.model.conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    lines = finish(trainer)
    assert torch.bfloat16 in seen
    assert all(math.isfinite(value) for value in lines.column("loss"))
    norms = [module for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for module in norms:
        assert module.weight.dtype == module.running_mean.dtype == torch.float32
    state = trainer.student_state()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_the_moving_average_is_exported(processes, tmp_path):
    config = config_of(train={"ema_decay": 0.7, "epochs": 1, "targets": "none"})
    trainer = trainer_of(config)
    average = {name: value.clone() for name, value in trainer.student_state().items()}
    update = trainer.ema.update

    def follow(model, step):
        update(model, step)
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 0.3 if step > 1 else 1.0)  # timm starts after the first steps

    trainer.ema.update = follow
    finish(trainer)
    state, raw = trainer.student_state(), trainer.model.student.model.state_dict()
    for name, _ in trainer.model.student.model.named_parameters():
        torch.testing.assert_close(state[name], average[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(state[name], raw[name])
    trainer.save(tmp_path)
    other = trainer_of(dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2)), tmp_path)
    assert other.loader.step == STEPS
    assert all(torch.equal(value, state[name]) for name, value in other.student_state().items())


def test_a_resumed_run_equals_an_undisturbed_one(processes, tmp_path):
    config = config_of(train={"epochs": 3, "keep_checkpoints": 2}, optim={"name": "sgd", "lr": 0.01})
    whole = trainer_of(config)
    lines, at = Lines(), 2 * STEPS - 1  # not the end of an epoch
    for step in whole.train(lines):
        if step in (1, STEPS, at):
            whole.save(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*")) == [f"step-{STEPS:08d}", f"step-{at:08d}"]
    resumed = trainer_of(dataclasses.replace(config, train=dataclasses.replace(config.train, workers=2)), tmp_path)
    assert resumed.loader.step == at
    rest = finish(resumed)
    assert rest.steps == lines.steps[at:]
    assert rest.column("lr") == lines.column("lr")[at:]
    assert rest.column("loss") == lines.column("loss")[at:]
    expected = whole.student_state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.student_state().items())


def test_live_targets_do_not_depend_on_the_number_of_workers(processes):
    trainers = [trainer_of(config_of(train={"targets": "live", "epochs": 1, "workers": count})) for count in (0, 2)]
    own, loaded = (finish(trainer).column("loss") for trainer in trainers)
    assert own == loaded


def test_the_rate_of_a_run_leaves_out_evaluations(processes, tmp_path):
    """What happens between two steps counts as time of the run, also after a resume, but not as time of its steps."""
    config = config_of(train={"epochs": 2, "targets": "none"})
    trainer = trainer_of(config)
    for step in trainer.train(Lines()):
        time.sleep(0.2)
        if step == STEPS:
            trainer.watchdog._progress_at = 0.0
            trainer.save(tmp_path)
            assert trainer.watchdog._progress_at > 0
    time.sleep(0.2)
    spent = trainer.spent()
    assert spent.total_s - spent.steps_s >= 0.2 * (2 * STEPS + 1)
    assert spent.steps_s > 0
    resumed = trainer_of(config, tmp_path).spent()
    assert resumed.total_s - resumed.steps_s >= 0.2 * STEPS  # with the pause in which it was saved
    assert resumed.total_s < spent.total_s


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_frozen_parameter_is_saved(processes, tmp_path, monkeypatch, zero):
    """A student from a plugin may have parameters that are not trained."""

    def frozen(*args, **options):
        student = build_student(*args, **options)
        next(student.model.parameters()).requires_grad_(False)
        return student

    monkeypatch.setattr("small_trainer.build_student", frozen)
    config = config_of(train={"epochs": 1, "zero": zero}, optim={"name": "sgd", "lr": 0.01})
    trainer = trainer_of(config)
    finish(trainer)
    trainer.save(tmp_path)
    expected = trainer.student_state()
    resumed = trainer_of(config, tmp_path).student_state()
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_the_optimizer_on_the_cpu_trains_saves_and_resumes_alike(processes, tmp_path):
    """ZeRO 2 with a DeepSpeed JSON that offloads the optimizer; its checkpoint resumes without ZeRO."""
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    optim = {"lr": 2e-4}
    offload = config_of(train={"zero": 2, "deepspeed": str(file)}, optim=optim)
    expected = finish(trainer_of(config_of(optim=optim))).column("loss")
    trainer, lines = trainer_of(offload), Lines()
    for step in trainer.train(lines):
        if step == STEPS:
            trainer.save(tmp_path)
    assert trainer.engine.optimizer.cpu_offload
    assert lines.column("loss") == pytest.approx(expected, rel=1e-3)
    for config in (offload, config_of(optim=optim)):
        assert finish(trainer_of(config, tmp_path)).column("loss") == pytest.approx(
            lines.column("loss")[STEPS:], rel=1e-5
        )


def test_a_checkpoint_of_another_order_is_refused(processes, tmp_path):
    trainer = trainer_of(config_of(train={"epochs": 1, "targets": "none"}))
    finish(trainer)
    trainer.save(tmp_path)
    with pytest.raises(UserError, match="different sample order"):
        trainer_of(config_of(train={"epochs": 1, "targets": "none", "shuffle_block": 16}), tmp_path)


@pytest.mark.parametrize(("save_every", "named"), [(STEPS, "logit"), (1, "weights")])
def test_nan_names_its_first_micro_batch_and_is_never_saved(processes, tmp_path, save_every, named):
    """Detected when the loss is logged, or before a checkpoint within the epoch is saved."""
    trainer = trainer_of(config_of(train={"log_every": 10}))
    original, calls = trainer.targets[0], []

    def broken(batch):
        calls.append(1)
        targets = original(batch)
        return targets._replace(logits=targets.logits * float("nan")) if len(calls) == 4 else targets

    trainer.targets = [broken]
    folder = RunFolder(tmp_path / "run", to_plain(trainer.config))
    folder.start_metrics(0)

    def run():
        for done in trainer.train(folder):
            if done % save_every == 0:
                trainer.save(tmp_path)

    with pytest.raises(UserError, match="became NaN or Inf") as error:
        run()
    assert "step 2, rank 0, micro-batch 1 (view 0, shards units/g000-r0000" in str(error.value)
    assert named in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    whole = [f"step-{number:08d}" for number in range(1, 2) if number % save_every == 0]
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == whole


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_exchanged_in_float32(processes, zero):
    """Under autocast too: DeepSpeed would exchange those of Linear and Conv in bfloat16 at ZeRO 1 to 3."""
    from deepspeed.runtime.torch_autocast import get_all_comm_dtypes

    trainer = trainer_of(config_of(train={"zero": zero, "precision": "bfloat16", "targets": "none"}))
    assert trainer.engine.torch_autocast_enabled()
    assert trainer.engine.communication_data_type == torch.float32
    assert get_all_comm_dtypes(trainer.model.parameters()) == {torch.float32}
    if zero:
        assert set(trainer.engine.optimizer.ipg_buckets) == {torch.float32}


def test_a_stall_is_reported_before_the_backend_ends_the_process(monkeypatch):
    import deepspeed

    given = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: given.append(options))
    start_processes(CPU, timeout_minutes=10)
    assert given[0]["timeout"].total_seconds() == 1.5 * 10 * 60


def test_signals_are_exchanged_at_logged_steps_and_every_ten_seconds(processes):
    """Two ranks, of which the other one received SIGTERM; the interval is two steps from the third one on."""
    trainer = trainer_of(config_of(train={"log_every": 100, "epochs": 3, "targets": "none"}))
    found = {}
    for step in trainer.train(Lines()):
        trainer.process = CPU._replace(world_size=2)
        found[step] = trainer.signal_of_any_rank(15)
        trainer.process = CPU
        if step == STEPS:
            assert trainer._signal_steps > STEPS  # these steps take less than ten seconds
            trainer._signal_steps = 2
    assert [step for step, signal in found.items() if signal] == [1, 2, STEPS, 4, 6, 9]


def test_channels_last_weights_change_losses_by_rounding_only(processes, tmp_path):
    """Also for a run that is resumed without them: what is saved does not depend on the memory format. A run that is
    resumed with them is exact."""
    options = {"name": "sgd", "lr": 0.01}
    plain = finish(trainer_of(config_of(optim=options))).column("loss")
    config = config_of(optim=options, train={"channels_last": True, "cudnn_benchmark": True})
    trainer, lines = trainer_of(config), Lines()
    weights = [module.weight for module in trainer.model.student.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for step in trainer.train(lines):
        if step == STEPS:
            trainer.save(tmp_path)
    assert torch.backends.cudnn.benchmark
    assert lines.column("loss") == pytest.approx(plain, rel=1e-4)
    assert finish(trainer_of(config, tmp_path)).column("loss") == lines.column("loss")[STEPS:]
    assert finish(trainer_of(config_of(optim=options), tmp_path)).column("loss") == pytest.approx(
        plain[STEPS:], rel=1e-4
    )
    assert not torch.backends.cudnn.benchmark


@pytest.mark.slow
def test_compiled_student_and_heads_have_the_same_losses_and_gradients(processes):
    """One micro-batch. Against float64, this student's gradients are off by 1.2% in float32, and by less compiled."""
    results = []
    for compiled in (False, True):
        trainer = trainer_of(config_of(train={"compile": compiled}))
        batch = next(iter(trainer.loader))
        targets = [source(batch) for source in trainer.targets]
        terms = trainer.model(batch.images, batch.labels, targets, trainer.tails).terms
        terms.total.backward()
        gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        results.append((torch.stack(terms).detach(), gradients, trainer.student_state().keys()))
    (terms, gradients, names), (compiled_terms, compiled_gradients, compiled_names) = results
    torch.testing.assert_close(compiled_terms, terms, rtol=1e-5, atol=1e-6)
    assert compiled_names == names
    plain = torch.cat([gradient.flatten() for gradient in gradients.values()])
    compiled = torch.cat([compiled_gradients[name].flatten() for name in gradients])
    assert float((compiled - plain).norm() / plain.norm()) < 0.03


@pytest.mark.parametrize("at", ["loss", "optimizer"])
def test_out_of_memory_says_what_to_lower(processes, monkeypatch, at):
    trainer = trainer_of(config_of(train={"targets": "none"}))

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(trainer.engine, "backward" if at == "loss" else "step", full)
    with pytest.raises(UserError, match="the GPU is out of memory") as error:
        next(trainer.train(Lines()))
    assert "train.micro_batch_size" in str(error.value)


def test_all_zero_stages_train_alike(processes, tmp_path):
    """The same losses and weights; a checkpoint of one stage resumes at any other: weights and optimizer state come out
    as they went in."""
    results, stages = {}, (0, 1, 2, 3)
    configs = {
        stage: config_of(train={"zero": stage, "epochs": 1}, optim={"warmup_epochs": 1, "lr": 2e-4}) for stage in stages
    }
    plain = build_student(configs[0].student, num_classes=10, image_size=64).model.state_dict()
    for stage, config in configs.items():
        trainer = trainer_of(config)
        lines = finish(trainer)
        state = trainer.student_state()
        assert {name: value.shape for name, value in state.items()} == {n: value.shape for n, value in plain.items()}
        assert not [name for name in trainer.engine.module.state_dict() if "tail" in name]
        results[stage] = lines.column("lr"), lines.column("loss"), state
        trainer.save(tmp_path / str(stage))
    rates, losses, weights = results[0]
    assert len(set(rates)) == 3
    for stage in stages[1:]:
        assert results[stage][0] == rates
        assert results[stage][1] == pytest.approx(losses, rel=1e-3)
        for name, value in results[stage][2].items():
            torch.testing.assert_close(value, weights[name], rtol=1e-2, atol=1e-3)
    for stage, other in itertools.product(stages, stages):
        again = trainer_of(configs[other], tmp_path / str(stage))
        again.save(tmp_path / "again")
        before, after = (latest_checkpoint(tmp_path / name)[0] for name in (str(stage), "again"))
        assert before.facts["numbers"] == after.facts["numbers"], (stage, other)
        for name in (STUDENT, MODEL, OPTIMIZER):
            old, new = before.tensors(name), after.tensors(name)
            assert old.keys() == new.keys(), (stage, other, name)
            assert len(old) > 9
            assert all(torch.equal(old[key], new[key]) for key in old), (stage, other, name)


def test_a_log_has_no_line_for_each_logged_step(processes, capsys):
    """Every step is logged here; between the first and the last line, a log gets a line only every 15 s."""
    trainer = trainer_of(config_of(train={"targets": "none"}))
    capsys.readouterr()
    finish(trainer)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill:")]
    assert lines[0].startswith(f"distill: 0/{2 * STEPS} steps")
    assert lines[-1].startswith(f"distill: {2 * STEPS}/{2 * STEPS} steps")
    assert "loss=" in lines[-1]
    assert len(lines) < 2 * STEPS
