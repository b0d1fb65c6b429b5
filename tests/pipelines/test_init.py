"""``retort init``: a project whose history works from the first commit on, apart from its images."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.dataset.params import Data
from pipelines import cli, init, named
from pipelines.params import build, load
from pipelines.steps import MAIN
from tests.components.conftest import Store, no_other_keys

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.fspath(REPO_ROOT))
    # git as it is on a machine where nobody has set it up
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person whose name git knows, and DVC, which looks for it at home."""
    config = tmp_path / "home" / ".gitconfig"
    config.parent.mkdir()
    config.write_text("[user]\n\tname = Ada\n\temail = ada@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.fspath(config))
    monkeypatch.setenv("HOME", os.fspath(config.parent))


def draw(folder: Path, classes: str = "ab", images: int = 12) -> Path:
    """Images that all differ, the same each time, as content decides splits; some in each split."""
    noise = np.random.default_rng(0)
    for split, label in itertools.product(["train", "val", "test"], classes):
        for copy in range(images):
            path = folder / split / label / f"{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    return folder


def ran(folder: Path, *words: str) -> str:
    """What a command said that must pass."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def staged_bytes(folder: Path) -> int:
    names = [name for name in ran(folder, "git", "ls-files", "-z").split("\0") if name]
    return sum((folder / name).lstat().st_size for name in names)


@pytest.mark.parametrize(
    "where", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("its own", "above"))]
)
def test_diffs_experiments_and_remotes_work_with_and_without_a_repository(
    where: str, tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "photos", images=2)
    project = tmp_path / "work/mine"
    if where != "none":
        place = project if where == "its own" else project.parent
        place.mkdir(parents=True)
        ran(place, "git", "init", "--quiet")
    assert cli.run(["init", os.fspath(project), "--images", "photos", "--no-measure"]) == 0
    if where == "none":
        assert ran(project, "git", "status", "--porcelain") == "", "the first commit is made"
    ran(project, "dvc", "repro", "--quiet", "ingest")
    if where == "none":
        ran(project, "git", "init", "--quiet")  # what the cautious do now: it changes nothing
    ran(project, "git", "add", "-A")
    assert 0 < staged_bytes(project) < 100_000
    assert not [name for name in ran(project, "git", "ls-files").split() if "cache" in name]
    ran(project, "git", "commit", "--quiet", "-m", "first")
    assert ran(project, "git", "status", "--porcelain") == ""

    file = project / "params.yaml"
    file.write_text(file.read_text().replace("    val: 0.2", "    val: 0.3"))
    changed = json.loads(ran(project, "dvc", "params", "diff", "--json"))
    assert changed["params.yaml"]["data.splits.val"]["new"] == 0.3
    ran(project, "dvc", "metrics", "diff", "--json")
    ran(project, "dvc", "exp", "run", "-n", "more", "-S", "data.splits.val=0.25", "ingest")
    ran(project, "dvc", "exp", "run", "--temp", "-n", "far", "-S", "data.splits.val=0.15", "ingest")
    assert ran(project, "dvc", "exp", "list", "--name-only").split() == ["far", "more"]
    assert '"far"' in ran(project, "dvc", "exp", "show", "--json")

    with remote(where, tmp_path, monkeypatch) as (url, settings):
        ran(project, "dvc", "remote", "add", "--default", "store", url)
        for key, value in settings.items():
            ran(project, "dvc", "remote", "modify", "store", key, value)
        ran(project, "dvc", "push", "ingest")
        ran(project, "git", "add", "-A")
        ran(project, "git", "commit", "--quiet", "-m", "second")
        assert "Running" not in ran(project, "dvc", "repro", "ingest"), "a commit of dvc.lock changes nothing"
        pulled_in_a_clone(project, where, tmp_path)


@contextmanager
def remote(where: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, str]]]:
    """A folder; in the slow cases a bucket of an S3 store."""
    if where == "none":
        yield os.fspath(folder / "store"), {}
        return
    no_other_keys(patch, folder)
    (folder / "weed").mkdir()
    store = Store(folder / "weed")
    try:
        yield "s3://photos/dvc", {"endpointurl": store.url, "region": "us-east-1"}
        assert store.client.list_objects_v2(Bucket="photos", Prefix="dvc/")["KeyCount"]
    finally:
        store.stop()


def pulled_in_a_clone(project: Path, where: str, tmp_path: Path) -> None:
    top = ran(project, "git", "rev-parse", "--show-toplevel").strip()
    ran(tmp_path, "git", "clone", "--quiet", top, "clone")
    clone = tmp_path / "clone" / ("mine" if where == "above" else ".")
    ran(clone, "dvc", "pull", "--quiet", "ingest")
    assert (clone / "outputs/ingest/report.json").exists()
    assert json.loads(ran(clone, "dvc", "status", "ingest", "--json")) == {}
    assert ran(clone, "git", "status", "--porcelain") == ""


def test_dvc_sees_files_that_parameters_name(tmp_path: Path, known: None) -> None:
    draw(tmp_path / "photos", images=2)
    project = tmp_path / "mine"
    assert cli.run(["init", os.fspath(project), "--images", "photos", "--no-measure"]) == 0
    file, mended = project / "params.yaml", project / "mended.csv"

    def name(value: str) -> None:
        lines = file.read_text().splitlines()
        (at,) = [number for number, line in enumerate(lines) if line.startswith("  corrections:")]
        file.write_text("\n".join([*lines[:at], f"  corrections: {value}", *lines[at + 1 :]]))

    def changed() -> list[str]:
        return list(json.loads(ran(project, "dvc", "status", "ingest", "--json")))

    mended.write_text("path,label\ntrain/a/0.png,a\n")
    name("mended.csv")
    ran(project, "dvc", "repro", "--quiet", "ingest")
    assert changed() == []
    ran(project, "git", "add", "-A")
    mended.write_text("path,label\ntrain/a/0.png,b\n")
    assert changed() == ["ingest"], "the same name, the same size, other content"
    ran(project, "dvc", "repro", "--quiet", "ingest")
    assert changed() == []
    rows = pq.read_table(project / "data/manifest.parquet", columns=["path", "class_name"]).to_pylist()
    assert {"path": "train/a/0.png", "class_name": "b"} in rows

    name("null")
    ran(project, "dvc", "repro", "--quiet", "ingest")
    mended.unlink()  # nobody reads it any more
    assert changed() == []
    assert [path.name for path in (project / "named/ingest").iterdir()] == ["README"]


def test_links_lead_to_what_parameters_name(tmp_path: Path) -> None:
    named.make(tmp_path, MAIN)
    for name in ("train.txt", "val.txt", "names.txt", "old.parquet"):
        (tmp_path / name).write_text(name)
    (tmp_path / "net/variables").mkdir(parents=True)
    (tmp_path / "net/variables/data").write_text("weights")
    away = tmp_path.with_name(f"{tmp_path.name}-away.safetensors")
    away.write_text("weights")
    params = build(
        {
            "data": {
                "source": {"train": "train.txt", "val": "val.txt"}, "class_names": "names.txt",
                "corrections": "missing.csv",
            },
            "validate": {"baseline": "old.parquet"},
            "teacher": {"weights": "net"},
            "student": {"weights": os.fspath(away)},
        }
    )  # fmt: skip
    for stage in ("ingest", "validate", "weights", "finetune"):
        named.link(MAIN[stage], params)
    links = {path.relative_to(tmp_path / "named") for path in tmp_path.glob("named/*/*") if path.is_symlink()}
    assert {os.fspath(link): (tmp_path / "named" / link).read_text() for link in links} == {
        "ingest/data.source=train.txt": "train.txt",
        "ingest/data.source=val.txt": "val.txt",
        "ingest/data.class_names=names.txt": "names.txt",
        "validate/validate.baseline=old.parquet": "old.parquet",
        "weights/teacher.weights=net%2Fvariables%2Fdata": "weights",
        f"weights/{named._name('student.weights', away)}": "weights",
    }
    assert (tmp_path / "named/ingest/data.source=train.txt").readlink() == Path("../../train.txt")
    named.link(MAIN["ingest"], build({"data": {"source": "digits"}}))
    assert [path.name for path in (tmp_path / "named/ingest").iterdir()] == ["README"]


def test_a_folder_of_very_many_images_is_not_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "photos", images=2)
    for limit, looked_at in ((12, True), (11, False)):
        monkeypatch.setattr(init, "MANY", limit)
        assert cli.run(["init", f"mine-{limit}", "--images", "photos", "--no-measure", "--no-git"]) == 0
        assert ("- ${data.source}" in (tmp_path / f"mine-{limit}/dvc.yaml").read_text()) is looked_at
        assert ("dvc repro -f ingest" in capsys.readouterr().out) is not looked_at


def test_nobodys_name_makes_no_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "mine"]) == 0
    assert "git add -A && git commit" in capsys.readouterr().out
    assert (tmp_path / "mine/.git").is_dir()
    ran(tmp_path / "mine", "git", "add", "-A")
    assert staged_bytes(tmp_path / "mine") < 100_000


def test_no_git_says_what_is_missing_and_how_to_have_it_later(
    tmp_path: Path, known: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init", "mine", "--no-git"]) == 0
    project = tmp_path / "mine"
    assert not (project / ".git").exists()
    advice = capsys.readouterr().out
    command = "git init && dvc config core.no_scm false"
    assert command in advice
    ran(project, "sh", "-c", command)
    (project / ".dvc/cache").mkdir(exist_ok=True)
    (project / ".dvc/cache/large").write_bytes(bytes(200_000))
    ran(project, "git", "add", "-A")
    assert staged_bytes(project) < 100_000
    ran(project, "git", "commit", "--quiet", "-m", "first")
    ran(project, "dvc", "params", "diff")


@pytest.mark.parametrize("missing", ["git", "nothing"])
def test_where_git_is_not_installed_or_another_calls(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "git":
        monkeypatch.setenv("PATH", os.fspath(Path(sys.executable).parent))
        assert cli.run(["init", "mine"]) == 0
        assert "git is not installed" in capsys.readouterr().out
        return
    ran(tmp_path, "git", "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", os.fspath(tmp_path / "other/.git"))  # as within a hook
    assert cli.run(["init", "mine"]) == 0
    assert (tmp_path / "mine/.git").is_dir()


def test_a_folder_that_a_repository_ignores_gets_its_own(tmp_path: Path) -> None:
    ran(tmp_path, "git", "init", "--quiet")
    (tmp_path / ".gitignore").write_text("scratch/\n")
    assert cli.run(["init", "scratch/mine"]) == 0
    assert (tmp_path / "scratch/mine/.git").is_dir()
    assert cli.run(["init", "kept/mine"]) == 0
    assert not (tmp_path / "kept/mine/.git").exists()


def test_images_in_the_project_are_not_for_git_and_a_persons_files_stay(tmp_path: Path, known: None) -> None:
    draw(tmp_path / "my photos [1]", images=1)
    for name in (".gitignore", "README.md", ".dvcignore"):
        (tmp_path / name).write_text("mine")
    assert cli.run(["init", ".", "--images", "my photos [1]", "--no-measure"]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    for name in (".gitignore", ".dvcignore"):
        assert (tmp_path / name).read_text().startswith("mine\n")
    ran(tmp_path, "git", "add", "-A")
    assert ".png" not in ran(tmp_path, "git", "ls-files")


def test_a_list_in_the_project_keeps_its_images_out_of_git(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    (photos / "train/a/0.png").rename(photos / "train/a/0.PNG")
    rows = [f"{path.relative_to(photos)} {'ab'.index(path.parent.name)}\n" for path in photos.rglob("*.*")]
    (tmp_path / "list.txt").write_text("".join(sorted(rows)))
    (tmp_path / "names.txt").write_text("a\nb\n")
    words = ["--images", "list.txt", "-o", "data.root=photos", "-o", "data.class_names=names.txt"]
    assert cli.run(["init", ".", *words, "--no-measure"]) == 0
    data = load(tmp_path / "params.yaml").data
    assert (data.root, data.class_names) == (str(tmp_path / "photos"), str(tmp_path / "names.txt"))
    ran(tmp_path, "git", "add", "-A")
    assert ".png" not in ran(tmp_path, "git", "ls-files").lower()
    ran(tmp_path, "dvc", "repro", "--quiet", "ingest")


def test_a_bucket_is_no_folder_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    values = Data(source="s3://photos/own", root="images")
    assert init._not_for_git(tmp_path, values) == []


def test_another_pipeline_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    assert cli.run(["init", "."]) == 1
    assert "dvc.yaml" in capsys.readouterr().err
    assert not (tmp_path / "params.yaml").exists()


def test_a_clone_on_another_machine_gets_its_link_to_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init", "mine"]) == 0
    link = tmp_path / "mine/components"
    before = (tmp_path / "mine/params.yaml").read_bytes()
    link.unlink()
    link.symlink_to("/nowhere/components")
    assert cli.run(["init", "mine"]) == 0
    assert (link / "dataset").is_dir()
    assert (tmp_path / "mine/params.yaml").read_bytes() == before
    assert cli.run(["init", "mine"]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("project", "images", "said"),
    [
        ("photos", "photos", "is the folder of images"),
        ("photos/mine", "photos", "lies in the folder of images"),
        ("photos/.mine", "photos", "lies in the folder of images"),
        ("link", "photos", "is the folder of images"),
        ("photos", "link", "is the folder of images"),
        ("link/train/mine", "photos", "lies in the folder of images"),
        (".", ".", "is the folder of images"),
        (".", "data", "is the project's own folder"),
        (".", "datalink", "is the project's own folder"),
        (".", "outputs", "is the project's own folder"),
        (".", "outputs/photos", "is the project's own folder"),
        (".", ".retort/photos", "is the project's own folder"),
        (".", "components", "is the project's own folder"),
    ],
)
def test_a_project_and_its_images_do_not_lie_in_each_other(
    project: str, images: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "photos", images=1)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "datalink").symlink_to("data")
    for name in ("data", "outputs/photos", ".retort/photos", "components"):
        (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(["init", project, "--images", images]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before, "nothing was made"


def test_the_way_out_of_the_images_own_folder_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(draw(tmp_path / "photos", images=1))
    assert cli.run(["init", ".", "--images", "."]) == 1
    command = capsys.readouterr().err.partition("such as: retort ")[2].split()
    assert command == ["init", "../photos-retort", "--images", "."]
    assert cli.run([*command, "--no-measure"]) == 0


@pytest.mark.parametrize(("project", "images"), [(".", "data/photos"), ("mine", "mine/pictures")])
def test_images_may_lie_in_a_folder_of_their_own_in_the_project(
    project: str, images: str, tmp_path: Path
) -> None:
    draw(tmp_path / images, images=1)
    assert cli.run(["init", project, "--images", images, "--no-measure"]) == 0
    ran(tmp_path / project, "dvc", "repro", "--quiet", "ingest")
    assert "ingest" not in json.loads(ran(tmp_path / project, "dvc", "status", "--json"))
