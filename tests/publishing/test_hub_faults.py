"""Every step of a push and of a load, with every fault: what happens, and what is said.

A run is a real command line in a process of its own, an unmodified client and a stand-in for the
Hub. Whatever goes wrong, the command ends in time, says what failed and what to do, and the
repository holds the whole commit or nothing of it. Where it failed, the remedy is tried as well:
the same command again, on a Hub that works, ends with exactly one commit.

The default run takes the faults that differ in what happens. ``EMA_TIMM_FAULTS=table.md`` runs all
of them (some minutes) and writes the table of steps and faults.
"""

import collections
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from support.stand_in_hub import TOKENS

TABLE = os.environ.get("EMA_TIMM_FAULTS", "")
LIMIT = 3  # seconds, of --time-limit; of the machine's clock only if the fault is a slow answer
MANY = 60  # requests; without a fault a command makes about 25
ALWAYS = 10**9

STATUSES = (401, 403, 404, 409, 412, 429, 500, 503)
DROPS = ("cut", "lost")
DAMAGES = ("short", "broken", "corrupt")
# What the command calls the work that a step of the protocol belongs to.
PUSH = {
    "info": "reading the repository",
    "create": "reading the repository",
    "branch": "reading the repository",
    "tree": "listing its files",
    "discussions": "looking for the commit",
    "preupload": "uploading",
    "batch": "uploading",
    "upload": "uploading",
    "verify": "uploading",
    "validate": "committing",
    "commit": "committing",
    "head": "fetching",
    "file": "fetching",
    "storage": "fetching",
}
LOAD = {step: "fetching" for step in ("head", "file", "storage")}
PASSES = {409, 429, 500, 503, "cut", "lost", "slow", "short", "broken", "corrupt"}
REMEDY = re.compile(
    r"[Rr]un the same command|log in anew|take one with write access|correct the name|"
    "accept the conditions"
)


class Case(NamedTuple):
    doing: str  # "push" or "load"
    step: str
    kind: int | str
    always: bool

    @property
    def recovers(self) -> bool:
        """Whether the command does its work in spite of the fault."""
        step, kind = self.step, self.kind
        if kind == 404 and self.doing == "load":
            return False
        if self.always:  # it has taken effect, and is found
            return kind == "lost" and step in ("create", "branch", "commit")
        if kind == 404:  # taken for a missing repository, made, found to exist
            return step == "info"
        if kind == 409:  # the client and the Hub mean "again" only in some places
            return step not in ("preupload", "batch", "upload", "verify", "branch", "head")
        return kind in PASSES

    def __str__(self):
        return f"{self.doing}-{self.step}-{self.kind}-{'always' if self.always else 'once'}"


def all_cases():
    for doing, steps in (("push", PUSH), ("load", LOAD)):
        for step in steps:
            downloads = step in ("file", "storage")
            for kind in (*STATUSES, *DROPS, "slow", *(DAMAGES if downloads else ())):
                if kind == "lost" and (downloads or step == "head"):
                    continue  # a read has no effect: the same as a cut
                yield from (Case(doing, step, kind, always) for always in (False, True))


DEFAULT = {
    ("info", 401, True), ("info", 404, True), ("info", 503, False), ("create", 403, True),
    ("create", "lost", False), ("branch", 409, True), ("tree", "cut", False),
    ("preupload", 404, True), ("batch", 429, False), ("upload", "cut", True), ("upload", 403, True),
    ("verify", 404, True), ("commit", 401, True), ("commit", 412, True), ("commit", 409, True),
    ("commit", 429, False), ("commit", 429, True), ("commit", 500, False),
    ("commit", "lost", True), ("commit", "slow", True), ("head", 401, True),
    ("file", "corrupt", False), ("storage", "short", True), ("storage", "corrupt", True),
    ("discussions", 403, True),
}  # fmt: skip
DEFAULT_DETECTOR = {
    ("info", 401, True), ("upload", "cut", True), ("commit", 412, True), ("commit", 429, False),
    ("commit", "lost", True), ("file", "corrupt", False), ("storage", "corrupt", True),
}  # fmt: skip
DEFAULT_LOAD = {
    ("head", 500, True), ("head", 401, True), ("file", "corrupt", True),
    ("storage", "corrupt", False), ("storage", "corrupt", True), ("storage", "broken", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def table():
    """Outcomes by kind of folder, step and fault, written out where TABLE says so."""
    outcomes = {kind: collections.defaultdict(list) for kind in ("network", "detector")}
    yield outcomes
    if TABLE:
        texts = [f"## A {kind}\n\n{as_table(found)}" for kind, found in outcomes.items() if found]
        Path(TABLE).write_text("\n".join(texts))


LEGEND = """\
Each cell: the fault once / always. `recovers`: exit code 0, the whole commit (or the model) is
there. `refused`: exit code 1, the message says what failed and what to do, nothing is there.
`unverified`: the same, and the whole commit is there. After each `refused` and `unverified` the
same command was run again without the fault, and ended with exactly one commit.
"""


def as_table(outcomes):
    kinds = list(dict.fromkeys(case.kind for case in outcomes))
    lines = [f"| step | {' | '.join(map(str, kinds))} |", "|---" * (len(kinds) + 1) + "|"]
    for doing, step in dict.fromkeys((case.doing, case.step) for case in outcomes):
        cells = []
        for kind in kinds:
            both = [outcomes.get(Case(doing, step, kind, always)) for always in (False, True)]
            first = [found[0] for found in both if found]
            cells.append(" / ".join(dict.fromkeys(first)) if first else "·")
        lines.append(f"| {doing}: {step} | {' | '.join(cells)} |")
    runs = sum(len(words) for words in outcomes.values())
    count = collections.Counter(words[0] for words in outcomes.values())
    total = ", ".join(f"{number} {word}" for word, number in count.items())
    return "\n".join([*lines, "", LEGEND, f"{len(outcomes)} faults ({total}), {runs} runs.", ""])


def inject(hub, case, small="config.json"):
    settings = {"times": ALWAYS if case.always else 1}
    if case.doing == "load" and case.step != "storage":
        settings["match"] = "model.safetensors" if case.step == "head" else small
    if case.kind == 429:
        settings["retry_after"] = 3600 if case.always and case.step == "commit" else 0
    if case.kind == "slow":
        settings["seconds"] = 2.0 * LIMIT if case.always else 0.5
    return hub.fault(case.step, case.kind, **settings)


def cases(doing):
    chosen = [case for case in all_cases() if case.doing == doing]
    wanted = DEFAULT if doing == "push" else DEFAULT_LOAD
    return chosen if TABLE else [case for case in chosen if case[1:] in wanted]


def pushes():
    """Every fault with a network's folder, and some with a detector's: the way is the same."""
    some = [case for case in cases("push") if TABLE or case[1:] in DEFAULT_DETECTOR]
    return [("network", case) for case in cases("push")] + [("detector", case) for case in some]


@pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
@pytest.mark.parametrize(("kind", "case"), pushes(), ids=str)
def test_push(stage, request, table, kind, case):
    hub, worker = stage
    folder = request.getfixturevalue("trained" if kind == "network" else "detector")
    repo = f"ada/{kind}-{case}"
    table = table[kind]
    args = ["publish", folder, "--repo-id", repo, "--time-limit", LIMIT]
    if case.step == "branch":
        args += ["--revision", "next"]
    if case.step == "discussions":
        args += ["--create-pr"]
    hub.heal()
    fault = inject(hub, case)
    done = worker.run(*args, real_time=case.kind == "slow")
    assert fault.hits, f"{case.step} was not reached: {hub.requests}"
    assert done["slept"] <= LIMIT
    assert len(hub.requests) < MANY, hub.requests
    assert no_token(done)
    commits = published(hub, repo, folder)
    if case.recovers:
        assert done["code"] == 0, done["err"]
        assert len(commits) == 1
        table[case] = ["recovers"]
        return
    assert done["code"] == 1, done["err"]
    last = done["err"].strip().splitlines()[-1]
    assert last.startswith("ema-timm: ") and PUSH[case.step] in last, done["err"]
    assert REMEDY.search(last), last
    if isinstance(case.kind, int) and "took more than" not in last:
        # 409 is "exists" when something is made; then it is looked for, and is not there.
        misled = case.kind == 409 and case.step in ("create", "branch")
        assert f"{case.kind}:" in last or (misled and re.search("404:|cannot be read", last)), last
    hub.heal()
    again = worker.run(*args)
    assert again["code"] == 0, again["err"]
    assert len(published(hub, repo, folder)) == 1
    table[case] = ["unverified" if commits else "refused", "again"]


@pytest.mark.parametrize("case", cases("load"), ids=str)
def test_load(stage, trained, digits, table, tmp_path, case):
    hub, worker = stage
    table = table["network"]
    repo = f"ada/{case}"
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    hub.store.put(repo, {**files, "pytorch_model.bin": b"what timm would go on to"}, "by hand")
    args = ["finetune", "--model", f"hf-hub:{repo}", "--data-dir", digits, "--img-size", 32]
    args += ["--epochs", 1, "--batch-size", 30, "--workers", 0, "--device", "cpu"]
    hub.heal()
    fault = inject(hub, case)
    done = worker.run(*args, "--output", tmp_path / "run", real_time=case.kind == "slow")
    assert fault.hits
    assert done["slept"] <= LIMIT
    assert len(hub.requests) < MANY, hub.requests
    assert no_token(done)
    assert not any("pytorch_model" in path for _, path in hub.requests)
    if case.recovers:
        assert done["code"] == 0, done["err"]
        table[case] = ["recovers"]
        return
    assert done["code"] == 1, done["err"]
    last = done["err"].strip().splitlines()[-1]
    assert last.startswith("ema-timm: ") and "fetching" in last
    assert REMEDY.search(last), last
    assert not list(tmp_path.rglob("*.safetensors"))
    hub.heal()
    again = worker.run(*args, "--output", tmp_path / "again")
    assert again["code"] == 0, again["err"]
    table[case] = ["refused", "again"]


def published(hub, repo, folder):
    """Our commits on any branch or pull request; each must hold every file as it is."""
    found = hub.store.repos.get(repo)
    commits = [c for c in found.commits.values() if c.title.startswith("Publish")] if found else []
    for commit in commits:
        for file in (path for path in folder.iterdir() if path.is_file()):
            assert commit.files[file.name].content == file.read_bytes()
    if found and not commits:
        assert set(found.resolve("main").files) == {".gitattributes"}
    return commits


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", cases("load"), ids=str)
def test_load_of_a_detector(stage, detector, table, case):
    hub, worker = stage
    table = table["detector"]
    repo = f"ada/detector-{case}"
    files = {path.name: path.read_bytes() for path in detector.iterdir()}
    hub.store.put(repo, {**files, "best.pt": b"what must not be read"}, "by hand")
    name = f"yolo-hub:{repo}"
    hub.heal()
    fault = inject(hub, case, small="detector.json")
    done = worker.load(name, real_time=case.kind == "slow")
    assert fault.hits
    assert not any(path.endswith(".pt") for _, path in hub.requests)
    if case.recovers:
        assert "outputs" in done, done
        table[case] = ["recovers"]
        return
    assert re.match("(Hub|Step)Error: fetching", done["error"]), done
    assert REMEDY.search(done["error"]), done
    assert not any(token in done["error"] for token in TOKENS)
    hub.heal()
    assert "outputs" in worker.load(name)
    table[case] = ["refused", "again"]


def no_token(done):
    return not any(token in done["out"] + done["err"] for token in TOKENS)
