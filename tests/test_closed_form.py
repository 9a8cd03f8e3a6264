"""The closed form equals the definition: outputs, every gradient, every way of running it."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ema_timm.ops.closed_form import closed_form
from ema_timm.ops.closed_form_autograd import closed_form_eager

FORMS = {"traceable": closed_form, "eager": closed_form_eager}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")

every_form = pytest.mark.parametrize("form", FORMS)


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    groups = draw(st.integers(1, 6))
    n = draw(st.integers(1, 9))
    batch = draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return oracle.make_case(
        (batch, groups * n, height, width),
        groups,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 10_000)),
    )


@every_form
@given(case=cases())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_output_and_every_gradient_equal_the_definition(form, case):
    oracle.assert_matches(FORMS[form], case)
