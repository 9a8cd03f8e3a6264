"""Publishing: one verified commit, made once, over nobody else's work."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from support.stand_in_hub import ADA, ADA_READS, BOB

from ema_timm.checkpoints.cards.file import write_card
from ema_timm.cli import main
from ema_timm.errors import HubError, UserError
from ema_timm.files import sha256
from ema_timm.hub.commit import Destination
from ema_timm.publishing.reload import fixed_logits, reload_elsewhere, same
from ema_timm.publishing.upload import publish

PUBLISHED = {
    "model.safetensors", "config.json", "README.md", "results.json", "configuration_ema_timm.py",
    "curves.png",
}  # fmt: skip


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the trained folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def hub(stage):
    stage[0].heal()
    return stage[0]


@pytest.fixture(autouse=True)
def _plain_http(monkeypatch):
    """As the command sets it for itself; here for what this process publishes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture
def push(stage, request):
    """``ema-timm publish`` to a repository of this test's own."""

    own = f"ada/{request.node.name}".replace("[", "-").strip("]")

    def run(folder, *args, repo=own, **settings):
        return stage[1].run("publish", folder, "--repo-id", repo, *args, **settings)

    run.repo = own
    return run


def ours(hub, repo, revision="main"):
    return [title for title in hub.titles(repo, revision) if title.startswith("Publish")]


def last_line(done):
    return done["err"].strip().splitlines()[-1]


def assert_refused(done, said, hub, code=2):
    assert done["code"] == code, done["err"]
    assert last_line(done).startswith("ema-timm: ") and said in last_line(done), done["err"]


def changed_results(folder, top1):
    """The folder as another measurement of the same weights leaves it, card and all."""
    results = json.loads((folder / "results.json").read_text())
    results["metrics"]["top1"] = top1
    (folder / "results.json").write_text(json.dumps(results))
    write_card(folder)
    return folder


@pytest.mark.slow
def test_the_whole_way_in_fresh_processes(trained, hub, hub_env):
    """The command as it is installed; it loads the model in two processes of its own."""
    env = {**os.environ, **hub_env(hub)}
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    command = [sys.executable, "-m", "ema_timm", "publish", trained, "--repo-id", "ada/whole-way"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before
    assert ADA not in done.stdout + done.stderr
    assert "model.safetensors: 100%" in done.stderr  # the progress bar of the upload
    files = hub.files("ada/whole-way")
    assert set(files) == PUBLISHED | {".gitattributes"}
    assert all(files[name] == (trained / name).read_bytes() for name in PUBLISHED)
    (title,) = ours(hub, "ada/whole-way")
    results = json.loads(files["results.json"])
    assert f"top-1 {results['metrics']['top1']:.2f}% of 23 images" in title
    assert hub.count("commit") == 1 and not hub.leaks
    url, line = done.stdout.splitlines()
    assert url.startswith(f"{hub.url}/ada/whole-way/commit/")
    assert line.startswith('timm.create_model("hf-hub:ada/whole-way@')


def test_dry_run_checks_and_prints_sizes_and_touches_no_network(folder, hub, push):
    (folder / "notes.txt").write_text("mine")
    done = push(folder, "--dry-run")
    assert done["code"] == 0, done["err"]
    for name in PUBLISHED:
        size = (folder / name).stat().st_size
        assert any(name in line and f"{size:,} bytes" in line for line in done["out"].splitlines())
    assert "notes.txt" not in done["out"] and "training" not in done["out"]
    assert hub.requests == [] and push.repo not in hub.store.repos
    (folder / "model.safetensors").write_bytes(b"?" * 100)
    assert_refused(push(folder, "--dry-run"), "damaged", hub)


def test_a_pickle_is_never_sent(folder, hub, push):
    for name in ("pytorch_model.bin", "model_best.pth.tar", "training/more.pt"):
        torch.save({}, folder / name)
    assert push(folder)["code"] == 0
    assert set(hub.files(push.repo)) == PUBLISHED | {".gitattributes"}


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_stray_picture_stays_and_that_is_said(folder, hub, push, rehearsed):
    (folder / "me.png").write_bytes(b"what somebody put there")
    done = push(folder, *["--dry-run"] * rehearsed)
    assert done["code"] == 0, done["err"]
    assert "me.png" not in done["out"] and "me.png" not in hub.files(push.repo)
    assert "not published, for neither README.md nor results.json names it: me.png" in done["err"]


def test_a_link_out_of_the_folder_is_not_followed(folder, hub, push):
    """A snapshot of the client's cache is made of links; with its files copied it goes."""
    (folder / "curves.png").rename(folder.parent / "elsewhere.png")
    (folder / "curves.png").symlink_to("../elsewhere.png")
    assert_refused(push(folder), "curves.png is a link", hub)
    assert hub.requests == []
    copied = shutil.copytree(folder, folder.parent / "copied")  # the remedy, as cp -rL does it
    assert push(copied)["code"] == 0


def test_the_same_folder_twice_is_one_commit(trained, hub, push):
    first, second = push(trained), push(trained)
    assert (first["code"], second["code"]) == (0, 0)
    assert first["out"] == second["out"]
    assert "nothing to commit" in second["err"]
    assert len(ours(hub, push.repo)) == 1 and hub.count("commit") == 1


def test_new_results_are_a_second_commit_over_a_generated_card(folder, hub, push):
    assert push(folder)["code"] == 0
    assert push(changed_results(folder, 12.5))["code"] == 0
    assert len(ours(hub, push.repo)) == 2
    assert b"12.50%" in hub.files(push.repo)["README.md"]


def test_a_commit_in_between_is_not_overwritten(trained, hub, push):
    theirs = {"README.md": b"mine now", "notes.md": b"hello"}
    hub.meanwhile("commit", lambda: hub.store.put(push.repo, theirs, "in between"))
    assert_refused(push(trained), "Somebody has committed in between", hub, code=1)
    assert hub.titles(push.repo)[0] == "in between"
    assert {k: hub.files(push.repo)[k] for k in theirs} == theirs
    done = push(trained)  # their card stays, and the difference is shown
    assert_refused(done, "--force", hub)
    assert "-mine now" in done["out"]
    assert push(trained, "--force")["code"] == 0
    assert hub.titles(push.repo)[1] == "in between"
    assert hub.files(push.repo)["notes.md"] == b"hello"


def test_a_card_edited_on_the_hub_is_kept(folder, hub, push):
    assert push(folder)["code"] == 0
    edited = hub.files(push.repo)["README.md"] + b"\nWith thanks to my dog.\n"
    hub.store.put(push.repo, {"README.md": edited}, "edit the card")
    done = push(changed_results(folder, 12.5))
    assert_refused(done, "was edited, and is kept", hub)
    assert "-With thanks to my dog." in done["out"]
    assert hub.titles(push.repo)[0] == "edit the card"
    (folder / "README.md").write_bytes(edited)  # the remedy
    assert push(folder, "--force")["code"] == 0
    assert hub.files(push.repo)["README.md"] == edited


def publish_here(folder, repo, hub, token=ADA):
    """Publish from this process; the loading back is taken for granted."""

    def reload(name, env):
        from ema_timm.checkpoints.config import read_config
        from ema_timm.checkpoints.network import build_network

        network = build_network(folder, read_config(folder))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return fixed_logits(network)

    return publish(folder, Destination(repo), reload=reload, api=HfApi(hub.url, token))


def test_two_publishers_of_one_folder_make_one_commit(trained, hub, push):
    others = []
    hub.meanwhile("commit", lambda: others.append(publish_here(trained, push.repo, hub)))
    done = push(trained)
    assert done["code"] == 0, done["err"]
    assert len(ours(hub, push.repo)) == 1
    assert others[0].commit in done["out"]


def test_two_publishers_of_different_folders_one_wins(trained, folder, hub, push):
    changed_results(folder, 12.5)
    hub.meanwhile("commit", lambda: publish_here(folder, push.repo, hub))
    assert_refused(push(trained), "Somebody has committed in between", hub, code=1)
    assert len(ours(hub, push.repo)) == 1
    assert b"12.50%" in hub.files(push.repo)["README.md"]


def test_a_lost_answer_is_looked_up_under_a_later_commit(trained, hub, push):
    hub.fault("commit", "lost", times=1)
    hub.meanwhile("commits", lambda: hub.store.put(push.repo, {"config.json": b"{}"}, "later"))
    done = push(trained)
    assert done["code"] == 0, done["err"]
    assert "but the commit has landed" in done["err"]
    commit = hub.store.repos[push.repo].history("main")[1]
    assert commit.title.startswith("Publish") and commit.oid in done["out"]


def test_where_nothing_can_be_looked_up_it_says_so(trained, hub, push):
    hub.fault("commit", "lost", times=1)
    hub.fault("commits", 403)
    done = push(trained)
    assert_refused(done, "whether the commit has landed is not known", hub, code=1)
    hub.heal()
    assert push(trained)["code"] == 0
    assert len(ours(hub, push.repo)) == 1


def test_a_pull_request_is_opened_once(trained, hub, push):
    hub.store.create(push.repo)
    hub.fault("commit", "lost", times=1)
    first, second = push(trained, "--create-pr"), push(trained, "--create-pr")
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert first["out"] == second["out"] and "/discussions/1" in first["out"]
    assert hub.store.repos[push.repo].pull_requests == {1: "open"}
    assert ours(hub, push.repo) == [] and len(ours(hub, push.repo, "refs/pr/1")) == 1
    refs = HfApi(hub.url, ADA).list_repo_refs(push.repo, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    hub.store.repos[push.repo].pull_requests[1] = "closed"
    assert "/discussions/2" in push(trained, "--create-pr")["out"]


def test_without_a_difference_no_pull_request_is_made_and_that_is_said(trained, hub, push):
    first, second = push(trained), push(trained, "--create-pr")
    assert (first["code"], second["code"]) == (0, 0)
    assert "no pull request was made: main holds these files already" in second["err"]
    assert "nothing to commit" not in second["err"]
    assert hub.store.repos[push.repo].pull_requests == {}
    assert first["out"] == second["out"]  # the commit that has them


def test_a_token_that_may_only_read_is_told_that_it_was_not_needed(trained, hub, push, capsys):
    assert push(trained)["code"] == 0
    landed = publish_here(trained, push.repo, hub, ADA_READS)
    assert not landed.new and landed.commit == hub.store.repos[push.repo].resolve("main").oid
    said = capsys.readouterr().err
    assert "nothing to commit, and whether the token may write was not asked" in said
    assert len(ours(hub, push.repo)) == 1


def test_a_branch_is_made_and_main_left_alone(trained, hub, push):
    assert push(trained, "--revision", "next/try")["code"] == 0
    assert ours(hub, push.repo) == []
    assert len(ours(hub, push.repo, "next/try")) == 1
    assert push(trained, "--revision", "next/try")["code"] == 0
    assert len(ours(hub, push.repo, "next/try")) == 1


def test_private_is_private_or_refused(trained, hub, push):
    assert push(trained, "--private")["code"] == 0
    assert hub.store.repos[push.repo].private
    hub.store.create("ada/public")
    done = push(trained, "--private", repo="ada/public")
    assert_refused(done, "exists and is public", hub)
    assert ours(hub, "ada/public") == []


def test_a_pickle_that_is_there_is_mentioned(trained, hub, push):
    hub.store.put(push.repo, {"pytorch_model.bin": b"?"}, "old")
    done = push(trained)
    assert done["code"] == 0 and "also holds pytorch_model.bin" in done["err"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--repo-id", "digits"], "must be USER/NAME"),
        (["--repo-id", "a/b/c"], "Give USER/NAME"),
        (["--repo-id", "ada/--x"], "Give USER/NAME"),
        (["--repo-id", "ada/x", "--revision", "0" * 40], "must name a branch"),
        (["--repo-id", "ada/x", "--revision", ""], "--revision is empty"),
        (["--repo-id", "ada/x", "--time-limit", "-1"], "--time-limit must be above 0 and at most"),
        (["--repo-id", "ada/x", "--time-limit", "inf"], "seconds, got inf"),
        (["--repo-id", "ada/x", "--revision", "next", "--create-pr"], "leave out --revision"),
    ],
)
def test_bad_destinations_are_refused_without_network(trained, hub, capsys, args, said):
    assert main(["publish", str(trained), *args]) == 2
    assert said in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("token", [ADA_READS, BOB])
def test_a_token_that_may_not_write_here(trained, hub, token):
    assert HfApi(hub.url, token).whoami()["name"] == ("bob" if token == BOB else "ada")
    with pytest.raises(HubError, match="take one with write access to ada's repositories"):
        publish_here(trained, "ada/not-yours", hub, token)
    assert "ada/not-yours" not in hub.store.repos


def test_without_a_token_nothing_is_sent(trained, hub, monkeypatch):
    monkeypatch.setattr("ema_timm.publishing.upload.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login, or set HF_TOKEN"):
        publish_here(trained, "ada/nobody", hub, token=None)
    assert hub.requests == []


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_a_number(folder):
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_others(folder):
    weights = load_file(folder / "model.safetensors")
    weights["fc.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_network(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architecture"] = "resnet18_ema"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut_off, not_a_number, of_others, another_network])
def test_a_damaged_folder_never_reaches_the_hub(folder, hub, push, damage):
    damage(folder)
    done = push(folder)
    assert done["code"] == 2, done["err"]
    assert last_line(done).startswith("ema-timm: ")
    assert hub.requests == []


def test_a_folder_that_loads_as_something_else_never_reaches_the_hub(trained, hub):
    def reload(name, env):
        return [[0.0] * 4] * 2

    with pytest.raises(UserError, match="does not answer as its own weights do"):
        publish(trained, Destination("ada/other"), reload=reload, api=HfApi(hub.url, ADA))
    assert hub.requests == []


def test_a_full_disk_while_fetching_back(trained, hub, push):
    done = push(trained, largest_file=100_000)
    assert_refused(done, "Free space, or set TMPDIR", hub, code=1)
    assert "holds the whole commit, but it was not verified" in last_line(done)
    assert push(trained)["code"] == 0
    assert len(ours(hub, push.repo)) == 1


def test_reload_says_why_a_folder_does_not_load(tmp_path):
    with pytest.raises(HubError, match=r"local-dir:.* does not load in a fresh process: "):
        reload_elsewhere(f"local-dir:{tmp_path}", {})


def test_same_allows_rounding_alone():
    assert same([[1.0, 2.0]], [[1.0, 2.0 + 1e-6]])
    assert not same([[1.0, 2.0]], [[1.0, 2.001]])
    assert not same([[1.0, 2.0]], [[1.0]])
    assert not same([[1.0, float("nan")]], [[1.0, float("nan")]])


def test_what_was_fetched_is_compared_byte_for_byte(trained, hub, push):
    """A corruption too small for the outputs is still seen: a byte of the weights' header."""
    hub.fault("storage", "corrupt", times=1)
    done = push(trained)
    assert done["code"] == 0 and "came back damaged; fetching it anew" in done["err"]
    assert sha256(trained / "model.safetensors") in push(trained, "--dry-run")["out"]
