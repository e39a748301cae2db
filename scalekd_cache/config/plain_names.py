"""Short names of common options, such as `--epochs` for `--train.epochs`, on the command line, in Python and in make.

In: nothing. Out: for each command, its plain names with their dotted names, the most common ones first.
Invariant: it imports only the standard library, because the Makefile uses it to check variables before an
environment exists.
"""


def _names(text: str) -> dict[str, str]:
    """Plain name -> dotted name, from words `plain` or `plain:dotted`."""
    pairs = (word.partition(":") for word in text.split())
    return {plain: dotted or plain for plain, _, dotted in pairs}


_LAUNCH = "nnodes node_rank master_addr master_port hostfile launcher restarts job local_addr threads"
_STAGE1 = (
    "data:data.source teacher:teacher.name teacher_weights:teacher.weights weights:teacher.weights "
    "views:cache.num_views size:views.size codec:cache.codec cache:cache.path student"
)
_STAGE1_MORE = (
    "teachers recipe target:cache.codec_target store:cache.backend pixels:views.pixels pixels_from:cache.pixels_from "
    "stored_features:cache.stored_features "
    "classes:data.classes pretrained:teacher.pretrained workers device"
)
_OVERRIDES = "data teacher_weights pixels_from device"

PLAIN_NAMES: dict[str, dict[str, str]] = {
    "cache-teacher": _names(f"{_STAGE1} nproc dry_run {_STAGE1_MORE} json {_LAUNCH}"),
    "distill": _names(
        "student:student.name cache epochs:train.epochs batch:train.global_batch_size run targets:train.targets "
        "heads:scalekd.projector zero:train.zero nproc dry_run recipe feature_share:scalekd.feature_share "
        "resume extend seeds:train.seeds student_size:student.image_size "
        "tracker:train.tracker init follow workers:train.workers json "
        f"{_OVERRIDES} {_LAUNCH}"
    ),
    "finetune": _names(
        "init model weights data:data.source size epochs batch lr labels_per_class out classes:data.classes "
        "pretrained seed weight_decay layer_decay label_smoothing ema_decay workers device json"
    ),
    "probe": _names("backbone data:data.source weights size classes:data.classes workers device json"),
    "evaluate": _names("run data workers device json"),
    "export": _names("run format out push private"),
    "report": _names(f"cache run runs out {_OVERRIDES}"),
    "verify": _names(f"cache deep json {_OVERRIDES}"),
    "repair": _names(f"cache workers {_OVERRIDES}"),
    "inspect": _names("cache key index view out pixels_from json"),
    "pull": _names("url cache views without_pixels data workers connections json"),
    "plan": _names(f"{_STAGE1} students epochs gpu heads feature_share json {_STAGE1_MORE}"),
    "prove": _names(f"cache student views init recipe heads feature_share json {_OVERRIDES}"),
    "publish": _names("cache to data_license teacher_license without_pixels pixels_from private connections json"),
    "fetch": _names("teacher"),
    "costs": _names("teacher student heads:scalekd.projector feature_share:scalekd.feature_share labeled all"),
    "import-upstream": _names("ckpt out student classes s4_query"),
}
"""Command -> plain name -> dotted name. Names have underscores here; on the command line, hyphens work too."""

SHORT = {dotted: f"--{plain.replace('_', '-')}" for names in reversed(PLAIN_NAMES.values())
         for plain, dotted in reversed(names.items()) if plain != dotted}  # fmt: skip
"""Dotted name -> its plain name on the command line, for messages."""
