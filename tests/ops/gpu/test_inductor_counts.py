"""What Inductor makes of the closed form for a GPU: kernels and bytes, counted without one."""

import json
from pathlib import Path

import pytest
import torch
from support import oracle

pytest.importorskip("triton", reason="PyTorch for this platform comes without Triton")

CODE = f"import json, sys; sys.path.insert(0, {str(Path(oracle.__file__).parents[1])!r})\n" + (
    "from functools import partial\n"
    "from support import inductor\n"
    "from ema_timm.ops.formula import closed_form\n"
    "def pinned(x, weights, groups):\n"
    "    return inductor.FUSED(x * int(x.shape[2]), weights, groups)\n"
    "forms = {'fused': inductor.FUSED, 'plain': closed_form, 'pinned': pinned}\n"
    "for shape, layout, form, free in json.loads(sys.argv[1]):\n"
    "    found = inductor.lowered(shape, layout, forms[form], free)\n"
    "    copies = sum(k.copies for k in found.forward + found.backward)\n"
    "    launches = len(found.forward), len(found.backward)\n"
    "    print(json.dumps([found.moved, *launches, copies, found.pinned]))"
)
FLOOR = 5  # sizes of x that must move: x and out; the gradient of out, x and its gradient


@pytest.fixture
def lowered(python):
    """Lower forms, each (shape, layout, form, free sizes), in a process of its own.

    For each: sizes of x moved, kernels of forward and backward, copies of x in float32, sizes that
    the kernels are bound to.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip(f"Inductor's private parts are those of PyTorch 2.14, not {torch.__version__}")
    try:
        import support.inductor  # noqa: F401
    except ImportError as error:
        pytest.skip(f"PyTorch {torch.__version__} has other private parts than 2.14: {error}")
    return lambda *cases: [
        json.loads(line) for line in python(CODE, args=[json.dumps(cases)]).splitlines()
    ]


# Sizes of x that forward and backward move and the kernels of both, with H and W fixed, then free;
# bfloat16, batch 256, PyTorch 2.14. A number that falls is to be lowered here.
MOST = {
    (256, 56, "contiguous"): ((34, 13, 33), (37.5, 14, 35)),
    (256, 56, "channels_last"): ((39, 15, 34), (48.5, 17, 38)),
    (2048, 7, "contiguous"): ((42, 13, 34), (48, 14, 36)),
    (2048, 7, "channels_last"): ((47, 14, 35), (60.5, 17, 39)),
}
SOONER = ((256, 56, "contiguous"), (2048, 7, "channels_last"))  # a quarter of a minute each


@pytest.mark.parametrize(
    ("channels", "size", "layout"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SOONER else pytest.mark.long)
        for case in MOST
    ],
)
def test_compiled_for_a_gpu_no_more_is_moved_than_was_counted(lowered, channels, size, layout):
    """Fixed sizes move at most 11 times the floor; free ones take the same kernels for all."""
    shape = channels, size, size
    found = lowered((shape, layout, "fused", False), (shape, layout, "fused", True))
    assert found[0][0] <= 11 * FLOOR
    for (moved, forward, backward, copies, pinned), most in zip(
        found, MOST[channels, size, layout], strict=True
    ):
        assert (moved <= most[0], forward <= most[1], backward <= most[2]) == (True,) * 3, found
        assert not copies
        assert not pinned


@pytest.mark.long
def test_the_count_sees_products_with_the_map_and_sizes_that_are_bound(lowered):
    cases = [((256, 56, 56), "contiguous"), ((2048, 7, 7), "channels_last")]
    for moved, *_, copies, _pinned in lowered(*[(*case, "plain", False) for case in cases]):
        assert moved > 11 * FLOOR
        assert copies
    ((*_, pinned),) = lowered((*cases[0], "pinned", True))
    assert len(pinned) == 1
