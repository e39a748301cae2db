"""ScaleKD's trainable heads: the projectors for both maps, and the forward pass through them and the tail.

In: the student's last two maps, S3 and S4, and the teacher's frozen tail, passed as a callable.
Out: up to four maps (B, C, H, W), one per tap and view, for the losses in `losses.py`. Linear heads return one map and
one vector (B, C). Without labels, there is also a vector (B, P).
Invariant: the tail is not a submodule, so it is not part of any state dict, optimizer or ZeRO partition. Every
parameter is used only in its own module's forward pass, and a learned query is projected once per batch.
"""

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn

from scalekd_cache.codec import Shape
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.activation_checkpointing import FirstPass, recomputed
from scalekd_cache.models.student import Student
from scalekd_cache.models.tail import Tail
from scalekd_cache.scalekd.losses import HeadOutputs, check_grid, term_weights
from scalekd_cache.scalekd.projectors import CAP, LinearHead, LinearProjector, LiteCAP, lite_width

WIDTH_PER_HEAD_S3 = 48
"""Default channels per attention head in the S3 projector, which gives 16 heads for Swin-L's 768 channels."""
WIDTH_PER_HEAD_S4 = 64
"""Default channels per attention head in the S4 projector, which gives 24 heads for Swin-L's 1536 channels."""


def choose_heads(option: str, given: int | None, dim: int, width_per_head: int) -> int:
    """The number of attention heads: `given`, or the largest divisor of `dim` that is at most dim // width_per_head.

    Raises `UserError` if `given` does not divide `dim`.
    """
    if given is None:
        most = max(1, dim // width_per_head)
        return max(heads for heads in range(1, most + 1) if dim % heads == 0)
    if given < 1 or dim % given:
        raise UserError(
            f"scalekd.{option} does not divide the attention width",
            got=given,
            expected=f"a divisor of {dim}",
            fix=f"change or omit scalekd.{option}",
        )
    return given


class ScaleKDHeads(nn.Module):
    """The projectors for both taps and both views (dual-view feature mimicking, DFM).

    Projectors that no loss in `config` uses are not built, so every parameter gets a gradient. A lite projector serves
    both views of a tap: both losses use the same map and the same pass through the tail. Linear heads use only S4 and
    no tail. Without labels, all types of heads have a linear map from the student's pooled embedding to the teacher's.

    Args:
        config: loss weights, head counts, attention scale and source of S4's query.
        tap_shapes: (C, h, w) for S3 and S4.
        tail_in_shape: (C3, H3, W3), the tail's input shape.
        tail_out_shape: (C, H, W), the shape of the teacher's last map.
        layer_norm: whether the student has no batch norm; used if `config.cap_norm` is auto.
        pooled: width of the pooled target in an unlabeled cache; 0 with labels, where only linear heads have a pooled
            output, with C channels.
        embedding: width of the student's pooled embedding; 0 if that is the mean of S4.

    Raises:
        UserError: head counts do not divide the teacher's widths, or a map has only one position.
    """

    def __init__(
        self,
        config: ScaleKDConfig,
        tap_shapes: tuple[Shape, Shape],
        tail_in_shape: Shape,
        tail_out_shape: Shape,
        layer_norm: bool = False,
        pooled: int = 0,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        check_grid(*tail_out_shape[1:])
        self.tail_in_shape, self.tail_out_shape = tail_in_shape, tail_out_shape
        self.s3, self.s4 = nn.ModuleDict(), nn.ModuleDict()
        self.pooled: nn.Linear | None = None
        self._first_pass: FirstPass | None = None
        self.tpp = config.tpp
        self.lite = config.projector == "lite"
        self.hand_over = config.s4_query == "s3" and config.s3 and config.projector in ("cap", "lite")
        on = term_weights(config)
        if config.projector == "linear" and on.s4_spatial > 0:
            self.s4["linear"] = LinearHead(tap_shapes[1][0], tail_out_shape, pooled, embedding)
            return
        for name, (_, height, width), weight in zip(("S3", "S4"), tap_shapes, (on.s3_frequency, on.s4_frequency)):
            if weight > 0 and height * width < 2:
                raise UserError(
                    f"the student's feature map {name} is 1x1, but the frequency loss needs at least two positions "
                    "(otherwise, it would divide by zero)",
                    fix="use larger views (--size) or a different student, or set --scalekd.frequency=false",
                )
        if pooled and on.pooled > 0:
            self.pooled = nn.Linear(embedding or tap_shapes[1][0], pooled)
        layer_norm = layer_norm if config.cap_norm == "auto" else config.cap_norm == "layer"
        shape_s3 = tail_in_shape if config.tpp else tail_out_shape
        widths = [lite_width(shape[0]) if self.lite else shape[0] for shape in (shape_s3, tail_out_shape)]
        heads_s3 = choose_heads("heads_s3", config.heads_s3, widths[0], WIDTH_PER_HEAD_S3)
        heads_s4 = choose_heads("heads_s4", config.heads_s4, widths[1], WIDTH_PER_HEAD_S4)

        def projector(tap: Shape, out: Shape, num_heads: int, learned_query: bool) -> nn.Module:
            if config.projector == "linear-tpp":
                return LinearProjector(tap[0], out)
            return (LiteCAP if self.lite else CAP)(
                tap[0],
                tap[1:],
                out[1:],
                out[0],
                num_heads=num_heads,
                attention_scale=config.attention_scale,
                learned_query=learned_query,
                layer_norm=layer_norm,
            )

        weights = {"spatial": (on.s3_spatial, on.s4_spatial), "frequency": (on.s3_frequency, on.s4_frequency)}
        if self.lite:
            weights = {"both": (on.s3_spatial + on.s3_frequency, on.s4_spatial + on.s4_frequency)}
        for view, (weight_s3, weight_s4) in weights.items():
            if weight_s3 > 0 or (weight_s4 > 0 and self.hand_over):
                self.s3[view] = projector(tap_shapes[0], shape_s3, heads_s3, True)
            if weight_s4 > 0:
                self.s4[view] = projector(tap_shapes[1], tail_out_shape, heads_s4, not self.hand_over)

    def checkpoint_gradients(self) -> None:
        """Recompute the projectors and the tail in the backward pass (`activation_checkpointing.py`)."""
        self._first_pass = FirstPass(self, "the ScaleKD heads")

    def forward(
        self, s3: Tensor, s4: Tensor, tail: Callable[[Tensor], Tensor], embedding: Tensor | None = None
    ) -> HeadOutputs:
        """The student's S3 (F, C3', h3, w3) and S4 (F, C4', h4, w4) -> maps (F, C, H, W) on the teacher's last grid.

        `embedding` (B, E) is the student's pooled embedding for the samples with a pooled target (None: the mean of
        `s4`).

        Teacher parameter perception (TPP): S3's projection passes through the frozen `tail`, (B, C3, H3, W3) ->
        (B, C, H, W), and gradients flow back through it. If s4_query is s3, the resulting map is also S4's query. It is
        not detached, so S4's losses also train S3's projector.
        """
        if "linear" in self.s4:
            map_s4, pooled = self.s4["linear"](s4, embedding)
            return HeadOutputs(None, None, map_s4, None, pooled)
        pooled = None if self.pooled is None else self.pooled(s4.mean((2, 3)) if embedding is None else embedding)
        with self._first_pass() if self._first_pass is not None else nullcontext():
            if self.lite:
                map_s3, map_s4 = self._project("both", s3, s4, tail)
                return HeadOutputs(map_s3, map_s3, map_s4, map_s4, pooled)
            s3_spatial, s4_spatial = self._project("spatial", s3, s4, tail)
            s3_frequency, s4_frequency = self._project("frequency", s3, s4, tail)
        return HeadOutputs(s3_spatial, s3_frequency, s4_spatial, s4_frequency, pooled)

    def _project(
        self, view: str, s3: Tensor, s4: Tensor, tail: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        map_s3: Tensor | None = None
        if view in self.s3:
            map_s3 = self._run(self.s3[view], s3)
            map_s3 = self._run(tail, map_s3) if self.tpp else map_s3
            assert map_s3.shape[1:] == self.tail_out_shape, (tuple(map_s3.shape), self.tail_out_shape)
        if view not in self.s4:
            return map_s3, None
        return map_s3, self._run(self.s4[view], s4, map_s3 if self.hand_over else None)

    def _run(self, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        return function(*args) if self._first_pass is None else recomputed(function, *args)


def make_heads(config: DistillConfig, student: Student, tail: Tail, pooled: int = 0) -> ScaleKDHeads:
    """Build the heads between a student and a teacher's tail. `pooled` is the width of the pooled target for data
    without labels; 0 with labels."""
    heads = ScaleKDHeads(
        config.scalekd,
        tap_shapes=student.tap_shapes,
        tail_in_shape=tail.in_shape,
        tail_out_shape=tail.out_shape,
        layer_norm=student.layer_norm,
        pooled=pooled,
        embedding=student.pooled_width,
    )
    if config.student.grad_checkpointing:
        heads.checkpoint_gradients()
    return heads
