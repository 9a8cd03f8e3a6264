"""The pytest plug-in of `timm_suite`: our names in the place of their plain twins."""

from collections import Counter

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs, is_model_pretrained
from timm_weights import StandInHub

# Tests on a list of names written out by timm that has none of our twins: ours take one's place.
IN_PLACE_OF = {
    "test_model_features_output_stride": "convnext_atto",
    "test_prune_intermediate_layers_params_used": "resnet33ts",
    "test_model_forward_torchscript_with_features_fx": "regnetx_002",
}
# By the start of a test's name: what cannot hold for ours, and why.
NOT_RUN = {
    "test_model_inference": "compares with outputs that timm recorded in the Hub repository of "
    "each plain network; there are none for ours",
    "test_model_features_output_stride[16-cifar_": "the last stage of a CIFAR network has stride 8",
}
# With --fast the longest tests run on one network only.
SLOW = {
    "test_prune_intermediate_layers_contract",
    "test_prune_intermediate_layers_params_used",
}
SMALLEST = "test_resnet_ema"


class Twins:
    """The pytest plug-in: parametrised tests get our names in place of their plain twins.

    Args:
        names: Our names to test, with their twins.
        fast: Leave out the longest tests and all tags but each name's first.
        hub: Where tests that load pretrained weights find them.
    """

    def __init__(self, names: dict[str, str], fast: bool, hub: StandInHub):
        self.names = names
        self.fast = fast
        self.hub = hub
        self.twin_of: dict[str, str] = {}  # a value of ours, with its tag -> timm's
        self.name_of: dict[str, str] = {}  # node id -> name
        self.twin_ids: dict[str, str] = {}  # node id of ours -> that of the plain twin
        self.loads: set[str] = set()  # tests whose every name has pretrained weights
        self.counts: dict[str, Counter] = {}
        self.skipped: dict[str, str] = {}
        self.not_run: Counter = Counter()
        self.left_out = 0

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "timeout: kept only by pytest-timeout")

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        definition = metafunc.definition
        definition.own_markers = [
            self._for_ours(definition.name, m) for m in definition.own_markers
        ]

    def _for_ours(self, test: str, mark: pytest.Mark) -> pytest.Mark:
        if mark.name != "parametrize" or "model_name" not in _argnames(mark):
            return mark
        at = _argnames(mark).index("model_name")
        rows = [_row(value) for value in mark.args[1]]
        anchor = IN_PLACE_OF.get(test)
        if rows and all(isinstance(r[at], str) and is_model_pretrained(r[at]) for r in rows):
            if any("." in row[at] for row in rows):
                self.loads.add(test)
        new = {}  # by text: a row may hold a dict, and two tags of timm's may be one of ours
        for row in rows:
            for name in self.names if row[at] == anchor else self._names(test, row[at]):
                ours = (*row[:at], name, *row[at + 1 :])
                new[repr(ours)] = ours if len(ours) > 1 else name
        if not new:
            return mark
        values = list(new.values())
        return pytest.mark.parametrize(mark.args[0], values, **mark.kwargs).mark

    def _names(self, test: str, plain: str) -> list[str]:
        """Our names for ``plain``, an architecture or an architecture with a tag."""
        architecture, _, tag = plain.partition(".")
        found = []
        for name in (n for n, twin in self.names.items() if twin == architecture):
            full = [name]
            if tag:
                tags = {f"{name}.{tag}", f"{name}.warm_{tag}"}
                # The CIFAR networks have no weights and one tag.
                if name.startswith("cifar_") and test not in self.loads:
                    tags = {f"{name}.untrained"}
                full = sorted(tags & set(timm.list_models(f"{name}.*", include_tags=True)))
            self.twin_of.update(dict.fromkeys(full, plain))
            found += full
        return found

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        kept, rest = [], []
        for item in items:
            name = self._name(item)
            test = getattr(item, "originalname", item.name)
            barred = [start for start in NOT_RUN if name and item.name.startswith(start)]
            self.not_run.update(barred)
            left = name and not barred and self.fast and self._is_slow(test, item)
            self.left_out += bool(left)
            (kept if name and not barred and not left else rest).append(item)
        order = {name: i for i, name in enumerate(self.names)}
        items[:] = sorted(kept, key=lambda item: order[self._name(item)])
        config.hook.pytest_deselected(items=rest)
        missing = set(self.names) - {self._name(item) for item in items}
        if missing:
            raise pytest.UsageError(f"no test of timm's was collected for {sorted(missing)}")

    def _is_slow(self, test: str, item) -> bool:
        """Whether a test is left to the whole suite: see `SLOW`; any tag but a name's first."""
        value = item.callspec.params["model_name"]
        name, _, tag = value.partition(".")
        return (tag and value != next(iter(get_arch_pretrained_cfgs(name)))) or (
            test in SLOW and name != SMALLEST
        )

    def _name(self, item) -> str:
        """The name of ours that a test runs on, without its tag; empty if there is none."""
        value = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        name = value.partition(".")[0] if isinstance(value, str) else ""
        return name if name in self.names else ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        value = item.callspec.params["model_name"]
        self.name_of[item.nodeid] = self._name(item)
        self.twin_ids[item.nodeid] = item.nodeid.replace(value, self.twin_of.get(value, "?"))
        if item.originalname in self.loads:
            self.hub.provide(value, self.names[self._name(item)])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(self.name_of[report.nodeid], Counter())[report.outcome] += 1
            if report.outcome == "skipped":
                self.skipped[report.nodeid] = self.twin_ids[report.nodeid]


def _argnames(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _row(value) -> tuple:
    value = getattr(value, "values", value) if not isinstance(value, dict) else value
    return value if isinstance(value, tuple) else (value,)
