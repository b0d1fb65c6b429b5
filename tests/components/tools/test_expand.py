"""Head expansion: new rows beside old ones, on real networks, and trained on Ray."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

from components.audit.plan_schema import Loss, Plan, Sampling
from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, read_report
from components.common.storage import sha256_file
from components.dataset import manifest
from components.models import build, checkpoint
from components.models.card import Lineage, ModelCard, read_card
from components.models.params import Arch, Head
from components.tools.expand.classes import Classes, choose, relabel, remap
from components.tools.expand.expand import expand
from components.tools.params import ExpandParams
from components.training import class_expansion
from components.training.inputs.index import open_index
from components.training.normalise import Normalise
from components.training.params import DistillParams
from tests.components.training.conftest import ARCH, SIZE, plain

OLD = ["digit 2", "digit 0"]  # not in the manifest's order: classes are told apart by name


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two of the four digits, trained on their images alone."""
    torch.set_num_threads(1)
    torch.manual_seed(2)
    arch = Arch(name=ARCH)
    module = build.create(arch, len(OLD))
    index = open_index(project / "data/clean.parquet")
    mean, std = build.preprocessing(arch)
    label = {2: 0, 0: 1}
    wanted = [row for row in index.rows("train").tolist() if index.labels[row] in label]
    inputs = Normalise(mean, std, torch.device("cpu"))(plain(index, str(project / "images"), wanted))
    target = torch.tensor([label[index.labels[row]] for row in wanted])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), target).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(30):  # running statistics follow slowly
            module(inputs)
    card = ModelCard(
        arch=arch, class_names=OLD, input_size=[3, SIZE, SIZE], mean=list(mean), std=list(std),
        data_fingerprint="00", lineage=[Lineage(source="a.pth", sha256="11", coverage=1.0)], sha256="",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained")
    checkpoint.save(folder / checkpoint.FILE, folder / checkpoint.CARD, module.eval(), card)
    return folder


@pytest.fixture
def old(data: SimpleNamespace, trained: Path) -> Path:
    """Its folder in the test's own project."""
    return Path(shutil.copytree(trained, data.teacher.parent / "old"))


def run_expand(
    params: DistillParams, data: SimpleNamespace, old: Path, out: Path, **settings: object
) -> dict[str, list[Finding]]:
    values = params.model_dump(by_alias=True)
    values["global"]["image_size"] = 224  # the classifier's own size decides
    given = ExpandParams.model_validate({**values, "expand": {"lr": 0.5, **settings}})
    expand(given, manifest=data.manifest, plan=data.plan, model=old, out=out, of="teacher")
    found: dict[str, list[Finding]] = {}
    for finding in read_report(out / "report.json").findings:
        found.setdefault(finding.rule, []).append(finding)
    return found


def test_names_that_were_exchanged_are_found_on_images(
    params: DistillParams, data: SimpleNamespace, old: Path
) -> None:
    """A card that names its rows the other way round would teach every new image a wrong neighbour."""
    card = read_card(old / "model.json")
    card.model_copy(update={"class_names": OLD[::-1]}).write(old / "model.json")
    with pytest.raises(FindingsError, match=r"model\.class_names: The old network recognises"):
        run_expand(params, data, old, Path("outputs/expand"))
    assert not Path("outputs/expand/model.safetensors").exists()


# --- how new rows begin ---------------------------------------------------------------------------------


def test_new_rows_by_hand() -> None:
    """Two old classes left and right of (0, 10); a new one above. All features share the (0, 10)."""
    weight, bias = torch.tensor([[1.0, 0.5], [-1.0, 0.5]]), torch.tensor([0.0, 0.0])
    old = {0: torch.tensor([4.0, 10.0]), 1: torch.tensor([-4.0, 10.0])}
    new = torch.tensor([0.0, 16.0])
    row, shift = class_expansion.init_new_classes(weight, bias, old, [new], torch.eye(2))
    # w = (0, 0.5); s = 1; m = (0, 12), so u = (0, 1)
    assert row[0].tolist() == pytest.approx([0.0, 1.5])
    grown = torch.cat([weight.double(), row]), torch.cat([bias.double(), shift])

    def logits(point: list[float]) -> list[float]:
        return (grown[0] @ torch.tensor(point, dtype=torch.float64) + grown[1]).tolist()

    own, at_old = logits([0.0, 16.0]), logits([4.0, 10.0])
    assert own[2] - max(own[:2]) == pytest.approx(at_old[0] - at_old[2]), "the border lies half-way"
    assert own[2] > max(own[:2])
    assert shift[0] < 0, "a plain mean with no bias would win everywhere: 16 * 1.5 is 24"


def test_new_rows_look_where_images_of_a_class_agree() -> None:
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2)
    old = {0: torch.tensor([3.0, 0.0]), 1: torch.tensor([-3.0, 0.0])}
    within = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # the ridge is 2: images scatter along the first axis
    row, _ = class_expansion.init_new_classes(weight, bias, old, [torch.tensor([3.0, 3.0])], within)
    # m = (1, 1); (2 / (3 + 2), 2 / (1 + 2)) = (0.4, 0.667): turned towards the second axis
    assert row[0, 1] / row[0, 0] == pytest.approx(5 / 3)
    assert float(row[0].norm()) == pytest.approx(1.0)


def test_the_statistics_are_those_of_what_the_classifier_is_fed() -> None:
    module = build.create(Arch(name=ARCH), 3).eval()
    images, labels = torch.randn(7, 3, SIZE, SIZE), [0, 0, 0, 1, 1, 1, 1]
    with torch.inference_mode():
        inputs = module.forward_head(module.forward_features(images), pre_logits=True).double().numpy()
    (found,) = class_expansion.feature_statistics(
        module, [(images[:3], labels[:3]), (images[3:], labels[3:])]
    )
    np.testing.assert_allclose(found.means[1], inputs[3:].mean(axis=0), rtol=1e-5, atol=1e-7)
    inner = [np.cov(part.T, bias=True) * len(part) for part in (inputs[:3], inputs[3:])]
    np.testing.assert_allclose(found.within, sum(inner) / 7, rtol=1e-3, atol=1e-6)


def test_new_rows_when_nothing_is_known_of_old_classes() -> None:
    weight, bias = torch.tensor([[1.0, 0.5], [-1.0, 0.5]]), torch.tensor([0.3, -0.2])
    means = [torch.tensor([0.5, 8.0]), torch.tensor([-0.5, 2.0])]
    row, shift = class_expansion.init_new_classes(weight, bias, {}, means, torch.eye(2))
    for at, mean in enumerate(means):
        two = torch.stack([(weight @ mean + bias).max().double(), row[at] @ mean.double() + shift[at]])
        assert two.softmax(0)[1] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        (Arch(name=ARCH), 1),
        (Arch(name=ARCH, head=Head(bottleneck=2), blocks="acb"), 1),
        (Arch(name="deit_tiny_distilled_patch16_224"), 2),
    ],
)
def test_old_rows_are_kept_on_every_kind_of_head(arch: Arch, layers: int) -> None:
    torch.manual_seed(5)
    module, grown = build.create(arch, 4).eval(), build.create(arch, 5).eval()
    assert len(class_expansion.classifiers(module)) == layers
    kept, new = [0, 1, 3], range(3, 5)
    images = torch.randn(10, 3, SIZE, SIZE) + torch.linspace(-2, 2, 5).repeat(2)[:, None, None, None]
    labels = [0, 1, 2, 3, 4] * 2
    statistics = class_expansion.feature_statistics(
        module, [(images[:5], labels[:5]), (images[5:], labels[5:])]
    )
    class_expansion.expand_head(module, grown, kept, statistics, new)
    with torch.inference_mode():
        before, after = module(images), grown(images)
    assert torch.equal(after[:, :3], before[:, kept]), "the same logits, bit by bit"
    seen = after.argmax(1)
    assert {3, 4} <= set(seen.tolist()), "new classes are seen, before any training"
    assert len(set(seen.tolist()) & {0, 1, 2}) >= 1, "and do not win everywhere"


def test_only_new_rows_move() -> None:
    """Weight decay and momentum would move old rows even where their gradients are zero."""
    module = build.create(Arch(name=ARCH, head=Head(bottleneck=2)), 5)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frozen = class_expansion.NewRows(module, 3)
    module.eval()
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            module(torch.randn(8, 3, SIZE, SIZE)), torch.arange(8) % 5
        ).backward()
        optimizer.step()
        frozen.keep()
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"classifier.expand.weight", "classifier.expand.bias"}
    last = module.get_submodule("classifier.expand")
    assert torch.equal(last.weight[:3], before["classifier.expand.weight"][:3])
    assert not torch.equal(last.weight[3:], before["classifier.expand.weight"][3:])


def test_a_network_without_rows_is_refused() -> None:
    with pytest.raises(RetortError, match=r"ends in 'classifier', a layer of the type Identity"):
        class_expansion.classifiers(build.create(Arch(name=ARCH), 0))


# --- classes, manifest and plan ----------------------------------------------------------------------------


def test_classes_are_told_apart_by_name(data: SimpleNamespace) -> None:
    table = manifest.read(data.manifest)
    classes = choose(OLD, table, None, data.manifest, Path("old"))
    assert classes == Classes(("digit 2", "digit 0", "digit 1", "digit 3"), (0, 1))
    mapped, labels = remap(table, classes)
    assert labels == {2: 0, 0: 1, 1: 2, 3: 3}
    assert manifest.class_names(mapped) == list(classes.names)
    assert mapped["path"] == table["path"]
    unlabeled = pc.equal(mapped["split"], "unlabeled")
    assert set(mapped.filter(unlabeled)["label"].to_pylist()) == {-1}
    assert set(mapped.filter(unlabeled)["class_name"].to_pylist()) == {None}


def test_classes_left_out_take_their_images_along(data: SimpleNamespace) -> None:
    table = manifest.read(data.manifest)
    classes = choose(OLD, table, ["digit 0"], data.manifest, Path("old"))
    assert classes == Classes(("digit 0", "digit 1", "digit 3"), (1,))
    mapped, labels = remap(table, classes)
    assert "digit 2" not in mapped["class_name"].to_pylist()
    dropped = table["class_name"].to_pylist().count("digit 2")
    assert mapped.num_rows == table.num_rows - dropped
    assert labels == {0: 0, 1: 1, 3: 2}


def test_the_plan_speaks_of_the_same_classes_by_their_new_labels() -> None:
    plan = Plan(
        sampling=Sampling(by_class={0: 1.5, 2: 3.0}, by_source={2: {"synthetic": 0.5}}, counts={0: 7, 2: 9}),
        loss=Loss(name="class_balanced", arguments={"beta": 0.9, "weights": {"0": 0.5, "2": 2.0}}),
    )
    moved = relabel(plan, {0: 4})
    assert moved.sampling.by_class == {4: 1.5}
    assert moved.sampling.by_source == {}
    assert moved.sampling.counts == {4: 7}
    assert moved.loss.arguments == {"beta": 0.9, "weights": {"4": 0.5}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("typo", r"expand\.old_classes: 'digitt 0' is no class of .*old; did you mean 'digit 0'\?"),
        ("nothing new", r"clean\.parquet: every class in it is known to .*'digit 2', 'digit 0'"),
        ("no training images", r"clean\.parquet: no training images of 'digit 3'.*data\.splits"),
        ("no model", r"model\.json: no such file"),
    ],
)
def test_bad_input(
    change: str, message: str, data: SimpleNamespace, params: DistillParams, old: Path
) -> None:
    table = manifest.read(data.manifest)
    settings: dict[str, object] = {}
    if change == "typo":
        settings["old_classes"] = ["digitt 0"]
    elif change == "nothing new":
        keep = pc.is_in(table["label"], pa.array([0, 2], pa.int32()))
        manifest.write(table.filter(keep), data.manifest)
    elif change == "no training images":
        gone = pc.and_(pc.equal(table["label"], 3), pc.equal(table["split"], "train"))
        manifest.write(table.filter(pc.invert(gone)), data.manifest)
    else:
        old = old / "elsewhere"
    with pytest.raises(RetortError, match=message):
        run_expand(params, data, old, Path("out"), **settings)
    assert not Path("out/model.safetensors").exists()
    assert not read_report(Path("out/report.json")).passed


# --- on Ray ------------------------------------------------------------------------------------------------


def test_only_the_new_rows_and_the_whole_network_in_one_run(
    data: SimpleNamespace, params: DistillParams, old: Path
) -> None:
    out = Path("outputs/expand")
    found = run_expand(params, data, old, out, mode="new_rows", epochs=2)

    module, card = checkpoint.load(out)
    assert card.class_names == ["digit 2", "digit 0", "digit 1", "digit 3"]
    assert card.input_size == [3, SIZE, SIZE]
    assert [entry.sha256 for entry in card.lineage] == ["11", sha256_file(old / checkpoint.FILE)]
    before, after = load_file(old / checkpoint.FILE), load_file(out / checkpoint.FILE)
    for name, tensor in before.items():
        same = after[name][:2] if name.startswith("classifier") else after[name]
        assert torch.equal(same, tensor), f"{name}: bit by bit"

    # the written manifest has the network's labels: predictions counted by hand give the same accuracy
    index = open_index(out / "clean.parquet")
    val = index.rows("val")
    pixels = plain(index, data.root, val.tolist())
    with torch.inference_mode():
        said = module(Normalise(card.mean, card.std, torch.device("cpu"))(pixels)).argmax(1).numpy()
    metrics = json.loads((out / "metrics.json").read_text())
    right, is_old = said == index.labels[val], index.labels[val] < 2
    assert metrics["val"]["top1"] == pytest.approx(right.mean())
    assert metrics["old"]["after"] == pytest.approx(right[is_old].mean())
    assert metrics["new"]["after"] == pytest.approx(right[~is_old].mean())
    assert metrics["old"]["images"] + metrics["new"]["images"] == len(val)
    assert metrics["old"]["before"] > 0.7, "what the old network recognised"
    assert metrics["new"]["before"] > 0.3, "rows from class means know something already"
    assert metrics["control"]["mode"] == "all"
    gain = metrics["control"]["val"]["top1"] - metrics["val"]["top1"]
    assert metrics["gain"]["val_top1"] == pytest.approx(gain)

    warned = found["expand.mode"][0]
    assert (warned.level, warned.row) == ("warning", "5.4")
    assert warned.message.startswith("only the new rows were trained")
    assert "95 % interval" in warned.message
    assert [finding.row for finding in found["expand.old_accuracy"] + found["expand.new_accuracy"]] == [
        "5.4"
    ] * 2
    history = list(csv.DictReader((out / "history.csv").open()))
    assert [row["phase"] for row in history] == ["new rows only"] * 2 + ["whole network"] * 2
    assert not Path(".retort/expand").exists(), "a finished step leaves nothing to go on from"


@pytest.mark.slow
def test_without_images_of_old_classes(data: SimpleNamespace, params: DistillParams, old: Path) -> None:
    table = manifest.read(data.manifest)
    only_new = table.filter(pc.is_in(table["label"], pa.array([1, 3, -1], pa.int32())))
    manifest.write(only_new, data.manifest)
    found = run_expand(params, data, old, Path("out"), mode="new_rows", control=False, epochs=1)
    levels = [finding.level for finding in found["expand.old_accuracy"]]
    assert levels == ["warning", "warning"], "nothing to remind the network of them, nothing to measure"
    assert "no training images of any old classes" in found["expand.old_accuracy"][0].message
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["old"]["after"] is None
    assert metrics["new"]["after"] == metrics["val"]["top1"]
    assert "control" not in metrics
    assert "control" in found["expand.mode"][0].advice, (
        "the difference is not known, and how to know it is said"
    )


@pytest.mark.slow
def test_a_chosen_subset_gives_the_same_bytes_twice(
    data: SimpleNamespace, params: DistillParams, old: Path
) -> None:
    settings = {"old_classes": ["digit 0"], "control": False, "epochs": 1, "lr": 0.05}
    run_expand(params, data, old, Path("first"), **settings)
    run_expand(params, data, old, Path("again"), **settings)
    for name in (checkpoint.FILE, checkpoint.CARD, "metrics.json", "history.csv", "clean.parquet"):
        assert Path("first", name).read_bytes() == Path("again", name).read_bytes()
    _, card = checkpoint.load(Path("first"))
    assert card.class_names == ["digit 0", "digit 1", "digit 3"]
    labels = manifest.read(Path("first/clean.parquet"), ["label"])["label"].to_numpy()
    assert np.unique(labels).tolist() == [-1, 0, 1, 2]
