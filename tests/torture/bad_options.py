"""Bad options as rows: wrong values of every option of every command, and meaningless values written by hand.

The first come from the commands' own schemas, so a new option has its rows at once.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from alignment import find
from runtime.options import Option, flags_of, kind_of, options_of
from tests.torture.rows import Row
from tests.torture.world import COMMANDS

WRONG = {int: ("many", "1.5", str(2**64)), float: ("much", "nan", "1e300"), str: ("", "\x07", "\udcff"), bool: ()}
"""Words that are not a value of an option, by its kind."""


def rows() -> Iterator[Row]:
    for name, command in COMMANDS.items():
        if command.schema:
            for opt in options_of(command.schema):
                yield from _of_option(name, opt)
    for opt in options_of(find("guided").Options):
        yield from _of_option("train_guide.py", opt, "guided")
    yield from _by_hand()


def _of_option(command: str, opt: Option, section: str = "") -> Iterator[Row]:
    """Values of the wrong kind, numbers out of bounds, a flag without its value, a misspelt flag."""
    if opt.field.metadata["rare"]:
        return
    flag = flags_of(opt.field, section)[0]
    kind, count = kind_of(opt.hint)
    repeats = count if isinstance(count, int) else 1
    for value in ["nonesuch"] if opt.field.metadata["choices"] else WRONG[kind]:
        named = (flag, value.encode("unicode_escape").decode())
        yield Row(command, f"{flag} {value!r}", (flag, *[value] * repeats), named)
    for number in out_of_bounds(opt):
        yield Row(command, f"{flag} {number}", (flag, *[str(number)] * repeats), (flag, "must lie in"))
    if kind is not bool:
        yield Row(command, f"{flag} without a value", (flag,), (flag,))
    misspelt = f"{flag[:-1]}{'q' if flag[-1] != 'q' else 'x'}"
    yield Row(command, misspelt, (misspelt, "1"), (misspelt,))


def out_of_bounds(opt: Option) -> list[float]:
    """A number below and one above the bounds of an option, where it has them."""
    bounds = opt.field.metadata["within"]
    if not bounds:
        return []
    low, high = map(float, bounds[1:-1].split(","))
    numbers = (low if bounds[0] == "(" else low - 1, high if bounds[-1] == ")" else high + 1)
    return [kind_of(opt.hint)[0](number) for number in numbers if math.isfinite(number)]


def _by_hand() -> Iterator[Row]:
    for command, lines in BY_HAND.items():
        for line in filter(None, map(str.strip, lines.splitlines())):
            given, _, culprit = line.partition(" -> ")
            words = tuple(shlex.split(given.replace("LONG", "a" * 300)))
            name = " ".join(word[:40] for word in words)
            yield Row(command, name, words, (culprit or _culprit(words),))


def _culprit(words: tuple[str, ...]) -> str:
    """What the answer must name: the place if there is one, else the last flag."""
    places = [word for word in words if word.startswith("/") or len(word) > 200]
    return places[0] if places else [word for word in words if word.startswith("--")][-1].lstrip("-")


TOKENS = """
    --ckpt /nowhere
    --data-dir /nowhere
    --blocks 7
    --blocks 0
    --t 1.5
    --items 0
    --items -3
    --batch-size 0
    --features f
    --out /dev/null/x
"""
"""What `probe`, `pca` and `tsne` share."""

BY_HAND = {
    "train.py": """
        --batch-size 4096
        --gradient-accumulation-steps 3
        --mixed-precision fp16
        --mixed-precision fp8
        --exp-name ''
        --exp-name ..
        --exp-name ../x
        --exp-name a/b
        --exp-name /abs
        --skip-steps 5 2
        --skip-steps 0 2
        --skip-steps 2 3
        --features pixels
        --mind
        --lr-scheduler cosine --lr-warmup-steps 1
        --align internal --align-depth 99 -> -depth
        --align contrastive --align-weight -1
        --eval-steps 5
        --num-fid-samples 2
        --measure 5
        --model SiT-B/3
        --model ''
        --align latnt
        --align none latent
        --align latent latent
        --preset paper
        --recipe sitt
        --init-ckpt /nowhere
        --data-dir /nowhere
        --data-dir /dev/null
        --config /nowhere
        --config /dev/null
        --vae /nowhere --sampling-steps 1
        --reference /nowhere --eval-steps 1 --features pixels
        --align-weight 1
        --guide-scale 30
        --align latent --align-interval 0.5 0.5
        --align latent --align-interval 0.7 0.4
        --align latent --align-interval -0.1 0.4
        --align latent --align-weight -0.5
        --align latent --align-depth 0 -> -depth
        --align latent --align-depth 99 -> -depth
        --align latent --align-hidden 0
        --align latent --latent-depth 2 --align-depth 3 -> -depth
        --align latent --align-stop-steps -1
        --align latent --align-stop-epochs -1
        --align latent --align-stop-steps 4 --align-stop-epochs 1
        --align latent --align-schedule cosine
        --align latent --align-plateau-steps 100
        --align latent --align-schedule plateau --align-plateau-steps 49
        --align latent --align-schedule plateau --align-stop-steps 99999 -> -schedule
        --align dispersive --align-schedule plateau -> -schedule
        --align dispersive --align-token-weights residual -> -token-weights
        --align contrastive --align-time-weights smooth -> -time-weights
        --align sra --align-distance token-cosine --align-token-weights residual -> -token-weights
        --align latent --align-mask upstream
        --align latent --preset papr
        --align sra --sra-tail-length 0
        --align sra --align-depth 0 -> -depth
        --align repa --align-encoder dinov9 -> dinov9
        --align layersync --align-depth 99 -> -depth
    """,
    "train_guide.py": """
        --guiding-ckpt /nowhere
        --guiding-depth 0
        --guiding-depth 7
        --guided-depth 99
        --guide-scale -1
        --align-hidden -1
        --align-interval 0.5 0.5
        --guiding-ckpt /dev/null
    """,
    "generate.py": """
        --ckpt hub:../../etc -> hub:../../etc
        --ckpt /nowhere
        --ckpt /dev/null
        --num-fid-samples 0
        --num-fid-samples -1
        --num-steps 1
        --num-steps -5
        --batch-size 0
        --cfg-scale -1
        --guidance-low 0.9 --guidance-high 0.1
        --guidance-high 1.5
        --guidance-low -0.5
        --timestep-shift 0
        --last-step 0
        --last-step 1
        --solver dopri5
        --mode sde --solver heun
        --mode sde --grid points
        --preset repa-cgf
        --preset repa-cfg
        --features pixels
        --mixed-precision fp16
        --vae /nowhere
        --reference /nowhere --features pixels
        --cfg-scale 1e9
        --internal-scale -1
        --internal-scale 2
        --internal-scale 1e9
        --internal-low 0.5
        --num-fid-samples 999999999999999999
        --mind
        --num-steps 999999999999999999
        --timestep-shift 1e-9
        --weights best
        --per-class 2
        --compare x
        --model SiT-B/2
        --out /dev/null/x
        --out LONG
        --num-classes 3
        --per-proc-batch-size 3
    """,
    "encode": """
        --images /nowhere
        --images /dev/null
        --vae /nowhere
        --vae pixels --statistics x
        --grey
        --resolution 0
        --resolution -16
        --resolution 17
        --batch-size 0
        --shard-size 0
        --workers -1
        --skip-bad -1
        --out /dev/null/x
        --out LONG
        --statistics /nowhere
    """,
    "import_latents": """
        --vae /nowhere
        --shard-size 0
        --num-classes 0
        --num-classes 1
        --keep-images
        --num-classes 999999999999999999
        --statistics x
        --out /dev/null/x
        --source /nowhere
        --source /dev/null
    """,
    "verify": """
        --data-dir /nowhere
        --num-images -1
        --vae /nowhere --num-images 2
    """,
    "convert": """
        --num-heads 0 -> heads
        --num-heads -2 -> heads
        --num-heads 7 -> heads
        --source /nowhere
        --source /dev
        --vae /nowhere
        --vae pixels --statistics some
        --out /dev/null/x
        --out /
    """,
    "evaluate": """
        --samples /nowhere
        --reference /nowhere
        --features incepton
        --batch-size 0
        --features timm:
        --feature-weights /nowhere --features inception
        --feature-weights /nowhere -> --feature-weights
        --samples /dev/null
        --out /dev/null/x
    """,
    "reference": """
        --images /nowhere
        --keep 0
        --batch-size 0
        --resolution 0
        --workers -1
        --num-images 0
        --out /dev/null/x.npz
        --features nothing
    """,
    "sweep": """
        --ckpt /nowhere
        --cfg-scale 2:1:0.1
        --cfg-scale 1:2:0
        --cfg-scale x
        --cfg-scale -1:1:0.5
        --cfg-scale 1:2
        --guidance-high 2
        --num-fid-samples 2
        --num-steps 1
        --reference /nowhere
        --cfg-scale nan
        --guidance-low 0.9 --guidance-high 0.5
        --batch-size 0
    """,
    "seal": """
        --file /nowhere
        --file /dev/null
        --file /
    """,
    "digits": "--out /dev/null/x",
    "probe": f"""{TOKENS}
        --items 4
        --masks /nowhere
        --masks /dev/null
        --encoder dinov9 -> dinov9
        --encoder-weights x
        --labels none
        --omega -1
        --weights best
    """,
    "pca": f"""{TOKENS}
        --classes 10
        --classes cat
        --omega -1
        --items 101
        --out .
    """,
    "tsne": f"""{TOKENS}
        --classes 10
        --classes cat
        --omega -1
        --items 50001
        --items 4
        --out ..
    """,
    "steps": """
        --scores /nowhere
        --scores /dev/null
        --scores /dev
        --metric fid
        --out /dev/null/x
        --out /
    """,
    "seeds": """
        --ckpt /nowhere
        --classes 10
        --num-steps 1
        --cfg-scale -1
        --out /dev/null/x
        --internal-scale 2
        --out x/..
    """,
    "time": """
        --runs /nowhere
        --runs /dev/null
        --out /dev/null/x
    """,
    "fdr": """
        --samples /nowhere
        --train /nowhere
        --train /dev/null
        --val /dev
        --batch-size 0
        --out /
        --out /dev/null/x.json
        --inception-weights w.pth
    """,
    "hub": """
        --ckpt /nowhere
        --to /dev/null
        --to /dev/null/x
        --metrics /nowhere
        --metrics /dev/null
        --private
    """,
    "export": """
        --ckpt /nowhere
        --out /dev/null/x.pt
        --out /
        --layout sitt
    """,
    "recipes list": """
        --results /dev/null
        --seeds nan
    """,
    "recipes run": """
        --seeds :
        --seeds 1:2:3
        --seeds 2:1
        --seeds -1
        --seeds 999999999999999999999999999999
        --processes 0
        --nodes 0
        --hours 0
        --hours 1e9
        --teraflops -1
        --images-per-second 0
        --scale medium
        --work /dev/null
        --results /dev/null
    """,
    "recipes table": """
        --target inf
        --seeds 0:9999
    """,
    "recipes check": "--results /dev/null",
}
"""A line is the arguments of a row and, after an arrow, what the answer must name (default: the place or last flag).

LONG stands for a name of 300 letters.
"""
