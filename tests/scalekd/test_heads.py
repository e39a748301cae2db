"""Heads: each projector compared with a dense reference written from the equations; tail, query and shapes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_cache.config.stage2 import ScaleKDConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.scalekd.heads import ScaleKDHeads, choose_heads
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.scalekd.projectors import CAP, Conv3x3, LinearHead, LiteCAP


@pytest.fixture(autouse=True)
def _fixed_state():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("projector", ["cap", "lite"])
def test_attention_gets_no_input_with_a_stride_of_zero(projector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's attention has been wrong for a query that is expanded over the batch."""
    seen, attention = [], F.scaled_dot_product_attention

    def watched(*args: Tensor, **options: Any) -> Tensor:
        seen.extend(args)
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    kind = CAP if projector == "cap" else LiteCAP
    kind(8, (4, 4), (2, 2), 16, num_heads=2)(torch.randn(3, 8, 4, 4))
    assert len(seen) == 3
    assert all(0 not in tensor.stride() for tensor in seen)


class MergingTail(nn.Module):
    """A minimal tail of a hierarchical teacher: 2x2 merging, a layer with a nonlinearity, norm; frozen."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.merge = nn.Linear(4 * channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.merge(F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1))
        return self.norm(merged + F.gelu(merged)).permute(0, 3, 1, 2)


class FlatTail(nn.Module):
    """A minimal tail of a plain ViT: grid and width stay the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Linear(channels, channels)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return (y + F.gelu(self.block(y))).permute(0, 3, 1, 2)


def targets_of(features: Tensor, num_classes: int = 0) -> Targets:
    removed = features - features.mean((2, 3), keepdim=True)
    norms = torch.stack([features.norm(dim=1), removed.norm(dim=1)], dim=1)
    return Targets(features, norms, torch.randn(len(features), num_classes, dtype=features.dtype))


def dense_norm(w: dict[str, Tensor], z: Tensor, norm: str) -> Tensor:
    """ReLU(norm(z)) of a projector's first layers, with stored statistics, batch statistics, or per position."""
    if norm == "stored":
        mean, var = (w[f"proj_student.1.running_{name}"].view(1, -1, 1, 1) for name in ("mean", "var"))
    else:
        over = 1 if norm == "layer" else (0, 2, 3)
        mean, var = z.mean(over, keepdim=True), z.var(over, unbiased=False, keepdim=True)
    gain, shift = w["proj_student.1.weight"].view(1, -1, 1, 1), w["proj_student.1.bias"].view(1, -1, 1, 1)
    return torch.relu((z - mean) / torch.sqrt(var + 1e-5) * gain + shift)


def dense_attention(w: dict[str, Tensor], tokens: Tensor, asked: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of one sample with explicit loops and softmax: tokens (N, C), query (M, D) -> (M, width)."""
    a = {
        name: source @ w[f"pos_attention.{name}.weight"].T + w[f"pos_attention.{name}.bias"]
        for name, source in (("q", asked), ("k", tokens), ("v", tokens))
    }
    size = a["q"].shape[1] // heads
    parts = []
    for head in range(heads):
        s = slice(head * size, (head + 1) * size)
        scores = a["q"][:, s] @ a["k"][:, s].T * (scale / math.sqrt(size))
        weights = torch.exp(scores - scores.amax(1, keepdim=True))
        parts.append(weights / weights.sum(1, keepdim=True) @ a["v"][:, s])
    return torch.cat(parts, 1) @ w["pos_attention.proj.weight"].T + w["pos_attention.proj.bias"]


def dense_end(w: dict[str, Tensor], y: Tensor, grid: tuple[int, int]) -> Tensor:
    """y = LayerNorm(y), y + FFN(y), as a map."""
    y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, unbiased=False, keepdim=True) + 1e-5)
    y = y * w["norm.weight"] + w["norm.bias"]
    hidden = torch.relu(y @ w["ffn.0.weight"].T + w["ffn.0.bias"])
    return (y + hidden @ w["ffn.2.weight"].T + w["ffn.2.bias"]).T.reshape(-1, *grid)


def dense_cap(w: dict[str, Tensor], x: Tensor, query: Tensor, heads: int, scale: float, norm: str) -> Tensor:
    """CAP from its equations: real convolutions, one query per sample, explicit loops and softmax."""
    z = F.conv2d(x, w["proj_student.0.weight"], w["proj_student.0.bias"], padding=1)
    kv = dense_norm(w, z, norm) + w["pos_embed"]
    q = torch.relu(F.conv2d(query, w["proj_pos.0.weight"][:, :, None, None], w["proj_pos.0.bias"]))
    grid = (query.shape[2], query.shape[3])
    outputs = []
    for sample in range(len(x)):
        y = dense_attention(w, kv[sample].flatten(1).T, q[sample].flatten(1).T, heads, scale)
        outputs.append(dense_end(w, y, grid))
    return torch.stack(outputs)


def dense_lite(w: dict[str, Tensor], x: Tensor, query: Tensor, heads: int, scale: float, norm: str) -> Tensor:
    """The lite projector from its equations: reduce to a quarter of the width, run CAP, expand to the full width."""
    narrow = torch.einsum("bchw,dc->bdhw", x, w["proj_student.0.weight"][:, :, 0, 0])
    narrow = narrow + w["proj_student.0.bias"][:, None, None]
    z = F.conv2d(narrow, w["proj_student.1.weight"], w["proj_student.1.bias"], padding=1)
    last = {
        name.replace("proj_student.2", "proj_student.1"): value for name, value in w.items() if "_student.2" in name
    }
    kv = dense_norm(last, z, norm) + w["pos_embed"]
    grid = (query.shape[2], query.shape[3])
    outputs = []
    for sample in range(len(x)):
        y = dense_attention(w, kv[sample].flatten(1).T, query[sample].flatten(1).T, heads, scale)
        outputs.append(dense_end(w, y @ w["widen.weight"].T + w["widen.bias"], grid))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", [CAP, LiteCAP])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("layer_norm", "training"), [(False, True), (False, False), (True, True)])
def test_projectors_equal_dense_references(
    learned: bool, layer_norm: bool, training: bool, kind: type[CAP | LiteCAP]
) -> None:
    heads, scale, batch = 3, 5.0, 4
    cap = kind(
        5, (4, 3), (2, 3), 12, num_heads=heads, attention_scale=scale, learned_query=learned, layer_norm=layer_norm
    ).double()
    for parameter in cap.parameters():  # gains of one and biases of zero would hide errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    if not layer_norm:
        cap.proj_student[-2].running_mean.normal_()
        cap.proj_student[-2].running_var.uniform_(0.5, 2)
    cap.train(training)
    norm = "layer" if layer_norm else "batch" if training else "stored"
    x = torch.randn(batch, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    given = None if learned else torch.randn(batch, 12, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = {name: value.detach().clone().requires_grad_() for name, value in cap.named_parameters()}
    buffers = {name: value.clone() for name, value in cap.named_buffers()}  # before the forward pass updates them

    ours = cap(x, given)
    query = weights["query"].T.reshape(1, 12, 2, 3).repeat(batch, 1, 1, 1) if given is None else given
    dense = (dense_cap if kind is CAP else dense_lite)({**weights, **buffers}, x, query, heads, scale, norm)
    assert ours.shape == (batch, 12, 2, 3)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-11)

    mix = torch.randn_like(ours)
    inputs = [x] if given is None else [x, given]
    got = torch.autograd.grad((ours * mix).sum(), [*inputs, *cap.parameters()])
    want = torch.autograd.grad((dense * mix).sum(), [*inputs, *weights.values()])
    for name, g, e in zip(["x", "given"][: len(inputs)] + list(weights), got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9 * float(e.abs().max() + 1), msg=name)


CASES = {
    "conv student, Swin-like": ((10, 14, 14), (20, 7, 7), (12, 14, 14), (24, 7, 7), MergingTail),
    "plain ViT student": ((12, 14, 14), (12, 14, 14), (12, 14, 14), (24, 7, 7), MergingTail),
    "plain ViT teacher": ((10, 14, 14), (20, 7, 7), (12, 14, 14), (12, 14, 14), FlatTail),
    "64 px demo, width 48": ((16, 4, 4), (32, 2, 2), (48, 8, 8), (96, 4, 4), MergingTail),
    "64 px demo, width 64": ((16, 4, 4), (32, 2, 2), (64, 8, 8), (128, 4, 4), MergingTail),
}


@pytest.mark.parametrize("query", ["s3", "learned"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_gradients(case: str, query: str) -> None:
    s3_shape, s4_shape, tail_in, tail_out, make_tail = CASES[case]
    heads = ScaleKDHeads(ScaleKDConfig(s4_query=query), (s3_shape, s4_shape), tail_in, tail_out)
    tail = make_tail(tail_in[0])
    s3, s4 = (torch.randn(2, *shape, requires_grad=True) for shape in (s3_shape, s4_shape))
    maps = heads(s3, s4, tail)
    assert maps.pooled is None
    assert all(m.shape == (2, *tail_out) for m in maps[:4])
    targets = targets_of(torch.randn(2, *tail_out))
    terms = distillation_losses(ScaleKDConfig(), TrainConfig(), torch.randn(2, 5), torch.tensor([0, 4]), maps, targets)
    terms.total.backward()
    missing = [name for name, p in heads.named_parameters() if p.grad is None or not p.grad.any()]
    # A key bias moves all scores of a query alike, so its gradient is zero up to rounding; it may be exactly zero.
    assert [name for name in missing if not name.endswith("k.bias")] == []
    assert s3.grad is not None
    assert s3.grad.any()
    assert s4.grad.any()


def test_gradient_flows_through_the_frozen_tail_alone() -> None:
    config = ScaleKDConfig(s4_query="learned")
    heads = ScaleKDHeads(config, ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    tail = MergingTail(12)
    before = {name: value.clone() for name, value in tail.state_dict().items()}
    s3 = torch.randn(3, 6, 4, 4, requires_grad=True)
    maps = heads(s3, torch.randn(3, 8, 2, 2), tail)
    (maps.s3_spatial.square().sum() + maps.s3_frequency.sin().sum()).backward()
    assert s3.grad.abs().sum() > 0
    for view in ("spatial", "frequency"):
        assert heads.s3[view].query.grad.abs().sum() > 0
    assert all(p.grad is None for p in heads.s4.parameters())
    assert all(p.grad is None for p in tail.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tail.state_dict().items())


@pytest.mark.parametrize("query", ["s3", "learned"])
def test_s4_trains_s3_through_its_query_only_when_handed_over(query: str) -> None:
    heads = ScaleKDHeads(ScaleKDConfig(s4_query=query), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    maps = heads(torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2), MergingTail(12))
    maps.s4_spatial.square().sum().backward()
    touched = heads.s3["spatial"].query.grad is not None
    assert touched == (query == "s3")
    assert heads.s3["frequency"].query.grad is None  # views do not mix
    assert (heads.s4["spatial"].query is None) == (query == "s3")


def test_state_dict_has_nothing_of_the_tail() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    tail = MergingTail(12)
    names = set(heads.state_dict())
    heads(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), tail)
    assert set(heads.state_dict()) == names
    assert {name.split(".")[0] for name in names} == {"s3", "s4"}
    assert all(name.split(".")[1] in ("spatial", "frequency") for name in names)
    owned = {p.data_ptr() for p in heads.parameters()}
    assert not owned & {p.data_ptr() for p in tail.parameters()}
    assert not any(isinstance(module, MergingTail) for module in heads.modules())


@pytest.mark.parametrize("batch", [1, 5])
def test_learned_query_is_projected_once_a_batch(batch: int) -> None:
    cap = CAP(4, (3, 3), (2, 2), 8, num_heads=2).eval()
    seen: list[tuple[int, ...]] = []

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(tuple(output.shape))

    cap.proj_pos[0].register_forward_hook(note)
    cap.pos_attention.q.register_forward_hook(note)
    assert cap(torch.randn(batch, 4, 3, 3)).shape == (batch, 8, 2, 2)
    assert seen == [(1, 4, 8), (1, 4, 8)]


def test_projectors_without_a_loss_are_not_built() -> None:
    shapes = ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2)
    swin_s = ScaleKDHeads(ScaleKDConfig(s4_query="learned", frequency_weight_s4=0), *shapes)
    maps = swin_s(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), MergingTail(12))
    assert [m is None for m in maps] == [False, False, False, True, True]
    handed = ScaleKDHeads(ScaleKDConfig(frequency_weight_s3=0), *shapes)  # S4's query still comes from S3
    maps = handed(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), MergingTail(12))
    assert all(m is not None for m in maps[:4])
    bare = ScaleKDConfig(frequency_weight_s3=0, frequency_weight_s4=0, spatial_weight=0)
    heads = ScaleKDHeads(bare, *shapes)
    assert list(heads.parameters()) == []


def test_lite_projectors_serve_both_views() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(projector="lite"), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    maps = heads(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), MergingTail(12))
    assert maps.s3_spatial is maps.s3_frequency
    assert maps.s4_spatial is maps.s4_frequency
    gradient = torch.autograd.grad(maps.s4_spatial.sum(), list(heads.s3.parameters()))  # S3's map is S4's query
    assert all(one.abs().sum() > 0 for one in gradient)


def test_tail_is_called_once_a_view_with_its_own_shape() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    seen: list[tuple[int, ...]] = []

    def counted(tail: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return tail(x)

        return call

    heads(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), counted(MergingTail(12)))
    assert seen == [(2, 12, 4, 4)] * 2
    with pytest.raises(AssertionError):
        heads(torch.randn(2, 6, 1, 1), torch.randn(2, 8, 2, 2), MergingTail(12))  # this would broadcast over positions


@pytest.mark.parametrize(
    ("dim", "width", "expected"),
    [(768, 48, 16), (1536, 64, 24), (512, 48, 8), (1024, 64, 16), (96, 64, 1), (24, 48, 1), (130, 48, 2), (97, 48, 1)],
)
def test_default_heads(dim: int, width: int, expected: int) -> None:
    assert choose_heads("heads_s3", None, dim, width) == expected


def test_bad_heads_and_grids_are_refused() -> None:
    shapes = ((6, 4, 4), (8, 2, 2)), (12, 4, 4)
    for given in (5, 0, -1):
        with pytest.raises(UserError, match="heads_s3"):
            ScaleKDHeads(ScaleKDConfig(heads_s3=given), *shapes, (24, 2, 2))
    with pytest.raises(UserError, match="heads_s4"):
        ScaleKDHeads(ScaleKDConfig(heads_s4=7), *shapes, (24, 2, 2))
    with pytest.raises(UserError, match="spatial grid"):
        ScaleKDHeads(ScaleKDConfig(), *shapes, (24, 1, 1))
    heads = ScaleKDHeads(ScaleKDConfig(heads_s3=3, heads_s4=6), *shapes, (24, 2, 2))
    assert heads.s3["spatial"].pos_attention.num_heads == 3
    assert heads.s4["frequency"].pos_attention.num_heads == 6


@pytest.mark.parametrize("projector", ["cap", "lite", "linear-tpp"])
@pytest.mark.parametrize("name", ["S3", "S4"])
def test_a_student_map_of_one_position_has_no_frequency(name: str, projector: Any) -> None:
    taps: Any = ((6, 1, 1), (8, 2, 2)) if name == "S3" else ((6, 2, 2), (8, 1, 1))
    shapes = (taps, (12, 4, 4), (24, 2, 2))
    with pytest.raises(UserError, match=f"the student's feature map {name} is 1x1"):
        ScaleKDHeads(ScaleKDConfig(projector=projector), *shapes)
    ScaleKDHeads(ScaleKDConfig(projector=projector, frequency=False), *shapes)
    ScaleKDHeads(ScaleKDConfig(projector="linear"), *shapes)
    off: dict[str, Any] = {name.lower(): False, "s4_query": "learned"}
    ScaleKDHeads(ScaleKDConfig(projector=projector, **off), *shapes)


@pytest.mark.parametrize(("cap_norm", "layer_norm"), [("auto", False), ("batch", True), ("layer", False)])
def test_norm_of_the_projectors(cap_norm: Any, layer_norm: bool) -> None:
    config = ScaleKDConfig(cap_norm=cap_norm)
    heads = ScaleKDHeads(config, ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2), layer_norm=layer_norm)
    found = any(isinstance(module, nn.BatchNorm2d) for module in heads.modules())
    assert found is (cap_norm != "layer")


def test_layer_norm_heads_hold_no_batch_norm() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2), layer_norm=True)
    assert list(heads.buffers()) == []
    s3, s4 = torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2)
    tail = MergingTail(12)
    whole, alone = heads(s3, s4, tail), heads(s3[:1], s4[:1], tail)
    torch.testing.assert_close(whole.s4_spatial[:1], alone.s4_spatial, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_losses_in_float32() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(), ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2))
    targets = targets_of(torch.randn(3, 24, 2, 2), num_classes=5)
    labels = torch.tensor([0, 3, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = heads(torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2), MergingTail(12))
        logits = nn.Linear(7, 5)(torch.randn(3, 7))
        assert logits.dtype == torch.bfloat16
        inside = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, labels, maps, targets)
    assert all(term.dtype == torch.float32 for term in inside)
    assert inside.total.dtype == torch.float32
    widened = type(maps)(*(m.float() for m in maps[:4]))
    outside = distillation_losses(ScaleKDConfig(), TrainConfig(), logits.float(), labels, widened, targets)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    inside.total.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_convolution_on_tiny_maps_is_the_convolution(side):
    """Both code paths of `Conv3x3` (side 5 exceeds the limit), values and gradients."""
    torch.manual_seed(side)
    ours = Conv3x3(6).double()
    theirs = torch.nn.Conv2d(6, 6, 3, padding=1).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, side, side, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-12, atol=1e-12)


def test_linear_heads_resize_maps_in_bfloat16_too():
    """The CPU has no resizing with antialiasing in bfloat16."""
    head = LinearHead(8, (16, 4, 4))
    x = torch.randn(2, 8, 2, 2)
    exact, _ = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = head(x)
    assert rounded.shape == exact.shape
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
