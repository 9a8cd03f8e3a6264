"""A detector on the Hub: its card, its one commit, what is refused, and loading it from there."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from support.stand_in_hub import ADA
from support.yolo import save
from ultralytics import YOLO

from ema_timm.checkpoints.cards.parts import is_generated
from ema_timm.cli import main
from ema_timm.errors import UserError
from ema_timm.integrations.yolo import inject, load, save_folder
from ema_timm.integrations.yolo.card import write_detector_card
from ema_timm.integrations.yolo.check import check_detector
from ema_timm.integrations.yolo.detector import trace_rows
from ema_timm.integrations.yolo.measure import measure_folder

pytestmark = pytest.mark.filterwarnings("default")  # ultralytics' own warnings are not ours
PUBLISHED = {"model.safetensors", "model.yaml", "detector.json", "README.md", "results.json"}


@pytest.fixture
def folder(detector, tmp_path):
    """A copy of the measured folder that a test may change."""
    return shutil.copytree(detector, tmp_path / "copy")


@pytest.fixture
def hub(stage):
    stage[0].heal()
    return stage[0]


@pytest.fixture
def push(stage, request):
    own = f"ada/{request.node.name}".replace("[", "-").replace(" ", "-").strip("]")

    def run(folder, *args):
        return stage[1].run("publish", folder, "--repo-id", own, *args)

    run.repo = own
    return run


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def unmeasured(folder):
    results = json.loads((folder / "results.json").read_text())
    del results["metrics"], results["evaluation"]
    (folder / "results.json").write_text(json.dumps(results))
    write_detector_card(folder)
    return folder


def test_the_card_has_what_the_hub_indexes(folder):
    write_detector_card(folder, {"repo_id": "ada/digits", "datasets": ["ada/scenes"]})
    facts = front_matter(folder)
    assert facts["tags"] == ["ultralytics", "yolo", "object-detection", "ema-attention"]
    assert facts["library_name"] == "ultralytics" and facts["license"] == "agpl-3.0"
    assert facts["pipeline_tag"] == "object-detection" and facts["datasets"] == ["ada/scenes"]
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    (found,) = facts["model-index"][0]["results"]
    assert {entry["name"]: entry["value"] for entry in found["metrics"]} == {
        "mAP@0.5, boxes": metrics["mAP50(B)"],
        "mAP@0.5:0.95, boxes": metrics["mAP50-95(B)"],
    }
    card = (folder / "README.md").read_text()
    assert is_generated(card)
    assert 'load("ada/digits")' in card and "pickle" in card and "`digit`" in card


def test_the_lines_of_the_card_load_the_detector(folder, detector, python, tmp_path):
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("PATH/TO/THIS/FOLDER", str(folder))
    places = "sys.argv[1], save=True, project=sys.argv[2], imgsz=64"
    code = code.replace('"image.jpg", save=True', places)
    picture = detector.parent / "set" / "images" / "val" / "0000.png"
    python(f"import sys\n{code}", args=[picture, tmp_path / "runs"])
    assert [file.stem for file in (tmp_path / "runs").rglob("*.*")] == ["0000"]


def test_a_card_without_a_measurement_says_so(folder):
    unmeasured(folder)
    assert "Nothing was measured of these weights" in (folder / "README.md").read_text()
    assert "model-index" not in front_matter(folder)
    check_detector(folder)


def test_what_was_measured_is_what_validation_counts(folder, detector):
    scenes = detector.parent / "set" / "digits.yaml"
    results = json.loads((folder / "results.json").read_text())
    again = measure_folder(folder, scenes, 64, device="cpu")
    assert again == results
    counted = load(folder).val(data=str(scenes), imgsz=64, device="cpu", plots=False, batch=16)
    assert results["metrics"]["mAP50(B)"] == pytest.approx(counted.box.map50, abs=1e-6)
    assert results["metrics"]["images"] == results["evaluation"]["data"]["images"] == 6
    assert (
        results["evaluation"]["imgsz"] == 64 and results["evaluation"]["data"]["name"] == "digits"
    )
    assert str(detector.parent) not in json.dumps(results)  # no path of this machine


def test_other_images_have_another_fingerprint(folder, detector):
    before = json.loads((folder / "results.json").read_text())["evaluation"]["data"]
    other = shutil.copytree(detector.parent / "set", folder.parent / "set")
    label = next((other / "labels" / "val").glob("*.txt"))
    label.write_text("0 0.5 0.5 0.1 0.1\n")
    described = (other / "digits.yaml").read_text()
    (other / "digits.yaml").write_text(described.replace(str(detector.parent / "set"), str(other)))
    (other / "labels" / "val.cache").unlink(missing_ok=True)
    after = measure_folder(folder, other / "digits.yaml", 64, device="cpu")["evaluation"]["data"]
    assert after["name"] == before["name"] and after["fingerprint"] != before["fingerprint"]


def test_other_classes_are_refused_before_anything_is_measured(detector, tmp_path):
    yolo = inject(YOLO("yolov8n.yaml"))
    save_folder(yolo, tmp_path / "made")
    with pytest.raises(UserError, match="has 1 classes, but the detector has 80"):
        measure_folder(tmp_path / "made", detector.parent / "set" / "digits.yaml", 64, device="cpu")
    with pytest.raises(UserError, match=r"cannot measure on .*nothing\.yaml"):
        measure_folder(tmp_path / "made", tmp_path / "nothing.yaml", 64, device="cpu")


def test_new_weights_lose_the_old_measurement_and_keep_what_was_told(folder):
    write_detector_card(folder, {"repo_id": "ada/digits"})
    yolo = load(folder)
    with torch.no_grad():
        next(yolo.model.parameters()).add_(1.0)
    save_folder(yolo, folder)
    with pytest.raises(UserError, match=r"is of another detector \(weights_sha256\)"):
        check_detector(folder)
    write_detector_card(folder)
    results = json.loads((folder / "results.json").read_text())
    assert "metrics" not in results and results["card"] == {"repo_id": "ada/digits"}
    check_detector(folder)


def test_the_command_makes_measures_and_describes_a_folder(detector, tmp_path, capsys):
    source, made = detector.parent / "tiny.pt", tmp_path / "made"
    assert main(["yolo", str(source), "--folder", str(made)]) == 0
    assert "not measured" in capsys.readouterr().out
    assert {file.name for file in made.iterdir()} == PUBLISHED
    data = ["--data", str(detector.parent / "set" / "digits.yaml"), "--img-size", "64"]
    assert main(["yolo", str(made), *data, "--device", "cpu"]) == 0
    assert "images: 6" in capsys.readouterr().out
    assert main(["card", str(made), "--repo-id", "ada/digits"]) == 0
    assert 'load("ada/digits")' in (made / "README.md").read_text()
    for a, b in zip(
        trace_rows(YOLO(source).model)[0], trace_rows(load(made).model)[0], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["yolo", "{pt}"], "yolo needs --output FILE"),
        (["yolo", "{pt}", "--folder", "{new}", "--after", "all"], "--after needs --output"),
        (["yolo", "{pt}", "--folder", "{new}", "--img-size", "64"], "--img-size needs --data"),
        (["yolo", "{pt}", "--folder", "{new}", "--output", "x.pt"], "excludes --folder"),
        (["yolo", "{pt}", "--data", "coco8.yaml"], "is not the folder of a detector"),
        (["yolo", "yolov8n.yaml", "--folder", "{new}"], "made of a checkpoint .pt"),
        (["card", "{folder}", "--license", "mit"], "--license is not for detectors"),
        (["publish", "{pt}", "--repo-id", "ada/x"], "ema-timm yolo {pt} --folder DIR"),
    ],
)
def test_the_commands_refuse_in_one_line(args, said, detector, folder, tmp_path, capsys):
    places = {"pt": detector.parent / "tiny.pt", "folder": folder, "new": tmp_path / "new"}
    assert main([arg.format(**places) for arg in args]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_whole_way_in_fresh_processes(folder, hub, hub_env, push):
    """The command as it is installed; the detector is loaded in two processes of its own."""
    for name in ("best.pt", "notes.txt"):
        (folder / name).write_text("mine")
    env = {**os.environ, **hub_env(hub)}
    command = [sys.executable, "-m", "ema_timm", "publish", folder, "--repo-id", push.repo]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ADA not in done.stdout + done.stderr
    files = hub.files(push.repo)
    assert set(files) == PUBLISHED | {".gitattributes"}
    assert all(files[name] == (folder / name).read_bytes() for name in PUBLISHED)
    (title,) = [title for title in hub.titles(push.repo) if title.startswith("Publish")]
    assert title.startswith("Publish tiny: mAP50-95(B) 0.") and title.endswith(" of 6 images")
    url, line = done.stdout.splitlines()
    commit = url.rsplit("/", 1)[1]
    assert line == f'ema_timm.integrations.yolo.load("{push.repo}", revision="{commit}")'
    code = f"import ema_timm.integrations.yolo\nprint({line}.model.yaml['nc'])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert loaded.stdout.splitlines()[-1] == "1", loaded.stderr


def test_the_same_folder_twice_is_one_commit(detector, hub, push):
    first, second = push(detector), push(detector)
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert first["out"] == second["out"] and "nothing to commit" in second["err"]
    assert hub.count("commit") == 1


def test_a_dry_run_prints_what_would_be_sent_and_touches_no_network(folder, hub, push):
    (folder / "me.png").write_bytes(b"what somebody put there")
    done = push(folder, "--dry-run")
    assert done["code"] == 0, done["err"]
    assert all(name in done["out"] for name in PUBLISHED) and "me.png" not in done["out"]
    assert "not published, for neither README.md nor results.json names it: me.png" in done["err"]
    assert hub.requests == []


def test_a_pickle_that_is_there_is_mentioned(detector, hub, push):
    hub.store.put(push.repo, {"best.pt": b"?"}, "old")
    done = push(detector)
    assert done["code"] == 0, done["err"]
    assert "also holds best.pt. A pickle can run any code" in done["err"]


def linked(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to("../elsewhere")


def edited_results(key, value):
    def apply(folder):
        file = folder / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return apply


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shows(folder, picture):
    """A card of one's own; such a one is published as it is."""
    (folder / "README.md").write_text(f"---\nlicense: agpl-3.0\n---\n![me]({picture})\n")


FAULTS = {
    "a link": (linked, "is a link"),
    "no card": (lambda f: (f / "README.md").unlink(), "Write it with: ema-timm card"),
    "no results": (lambda f: (f / "results.json").unlink(), "Write it with: ema-timm card"),
    "no description": (lambda f: (f / "detector.json").unlink(), "missing or damaged"),
    "no YAML": (lambda f: (f / "model.yaml").unlink(), "missing or damaged"),
    "cut weights": (cut, "damaged"),
    "results of others": (edited_results("parameters", 5), "another detector (parameters)"),
    "results of a newer format": (edited_results("format", 2), "is of format 2"),
    "metrics of nothing": (edited_results("evaluation", {}), "has metrics without their data"),
    "another picture": (lambda f: shows(f, "../me.png"), "is in the card's folder"),
    "a card of other results": (edited_results("metrics", {"images": 6}), "not of these results"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_never_reaches_the_hub(fault, folder, hub, push):
    spoil, message = FAULTS[fault]
    spoil(folder)
    done = push(folder)
    last = done["err"].strip().splitlines()[-1]
    assert done["code"] == 2 and last.startswith("ema-timm: ") and message in last, done["err"]
    assert hub.requests == []


def test_a_repository_without_such_a_folder_is_refused_and_its_pickle_not_read(stage, hub):
    hub.store.put("ada/pickle", {"best.pt": b"?", "README.md": b"?"}, "by hand")
    done = stage[1].load("yolo-hub:ada/pickle")
    assert "has no detector.json" in done["error"] and "pickle" in done["error"]
    assert not any(path.endswith(".pt") for _, path in hub.requests)


def test_all_files_are_of_the_commit_that_was_asked_for(stage, detector, hub):
    """Also where the branch moves between two of them."""
    repo = "ada/moving"
    files = {file.name: file.read_bytes() for file in detector.iterdir()}
    hub.store.put(repo, files, "first")
    broken = {"model.yaml": b"nc: 3\n", "model.safetensors": b"?"}
    hub.meanwhile("file", lambda: hub.store.put(repo, broken, "second"))
    assert "outputs" in stage[1].load(f"yolo-hub:{repo}")
    assert "error" in stage[1].load(f"yolo-hub:{repo}")
    (first,) = [c.oid for c in hub.store.repos[repo].history("main") if c.title == "first"]
    assert "outputs" in stage[1].load(f"yolo-hub:{repo}@{first}")


def test_an_rt_detr_goes_the_same_way(tmp_path):
    from ultralytics import RTDETR

    yolo = inject(RTDETR("rtdetr-resnet50.yaml"))
    save_folder(yolo, tmp_path / "made")
    write_detector_card(tmp_path / "made")
    assert check_detector(tmp_path / "made").results["detector"]["decoder"] == "RTDETR"
    assert "rt-detr" in front_matter(tmp_path / "made")["tags"]


def test_a_checkpoint_of_its_own_training_is_taken(detector, tmp_path):
    """Names and image size come from the checkpoint, the architecture's name from its YAML."""
    yolo = inject(YOLO("yolov8n.yaml"))
    yolo.model.names = {number: f"class {number}" for number in range(80)}
    save(yolo, tmp_path / "best.pt")
    assert main(["yolo", str(tmp_path / "best.pt"), "--folder", str(tmp_path / "made")]) == 0
    results = json.loads((tmp_path / "made" / "results.json").read_text())
    assert results["architecture"] == "yolov8n" and results["classes"][79] == "class 79"
    assert [layer["row"] for layer in results["layers"]] == [16, 20, 24]
