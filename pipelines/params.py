"""``params.yaml`` as a type: all sections in one, loaded, overridden and checked."""

from __future__ import annotations

import codecs
import copy
import difflib
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.nodes import MappingNode, Node

from components.audit.params import Audit
from components.benchmark.params import Benchmark
from components.common.errors import ConfigError
from components.common.params import Checks, Global, Registry, ReportSettings, Section
from components.dataset.params import Data, Validate
from components.export.params import Export
from components.models.params import Net
from components.retraining.params import Retrain
from components.tools.params import CompareWeights, Expand, Tune
from components.training.params import Distill, Ray

S = TypeVar("S", bound=BaseModel)
SHORT = reprlib.Repr()  # of a value at fault: written out, aliases in YAML can fill the memory
SHORT.maxstring, SHORT.maxlevel = 100, 2
QUANTITY = r"^\d+(\.\d+)?([EPTGMK]i?)?$"  # bytes as Kubernetes and kfp write them: 8Gi, 500M


class Toleration(Section):
    """Of a taint of nodes; empty: whatever it is, as Kubernetes has it."""

    key: str = Field("", description="of the taint; empty: every key, with operator Exists")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="Exists: whatever the taint's value is")
    value: str = Field("", description="of the taint")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        "", description="of the taint; empty: every effect"
    )


class Kubeflow(Section):
    """Where the DAG runs, and what is compiled into it."""

    host: str = Field(
        "", description="URL of the KFP server's API; https://HOST/pipeline where Kubeflow has users"
    )
    namespace: str = Field("", description="where runs belong, on a server that has users")
    token_file: str | None = Field(
        None,
        description="file with a bearer token; null: RETORT_KFP_TOKEN, or a pod's own service account token",
    )
    ca_file: str | None = Field(
        None, description="PEM file of the CA that signed the server's certificate; null: the usual ones"
    )
    service_account: str | None = Field(
        None, description="Kubernetes service account of the pods; null: the server's default"
    )
    image: str = Field(
        "retort:latest", description="image of the components; cached only with a digest (NAME@sha256:...)"
    )
    light_image: str | None = Field(
        None, description="image without torch, for ingest, validate and the audits; null: the same image"
    )
    pull_secrets: list[str] = Field(
        default=[], description="Kubernetes secrets with which the images are pulled"
    )
    experiment: str = Field("retort", description="KFP experiment")
    deadline_hours: float = Field(
        72, gt=0, le=8760, description="after which the server ends a run, even one that waits for a node"
    )
    memory: str = Field(
        "16Gi", pattern=QUANTITY, description="memory of the training pods, /dev/shm included"
    )
    shm: str = Field("8Gi", pattern=QUANTITY, description="memory-backed /dev/shm of the training pods")
    small_cpus: int = Field(2, ge=1, description="processors of the other pods; a benchmark may take more")
    small_memory: str = Field("8Gi", pattern=QUANTITY, description="memory of the other pods")
    scratch: str = Field(
        "20Gi", pattern=QUANTITY, description="disk that a pod may fill in /work, and as much in /tmp"
    )
    gpu: str | None = Field(None, description="accelerator resource, such as nvidia.com/gpu; null: none")
    node_selector: dict[str, str] = Field(
        default={}, description="labels of the nodes that training pods run on"
    )
    tolerations: list[Toleration] = Field(
        default=[], description="taints of nodes that training pods stand, such as those of a GPU pool"
    )
    run_as_user: Annotated[int, Field(ge=1)] | Literal["namespace"] = Field(
        10001, description="user of the pods, in group 0; namespace: whom that says (OpenShift)"
    )
    state: str | None = Field(
        None,
        pattern=r"^s3://[^/]+/.+",
        description="s3://bucket/prefix of what outlives a pod: the spool, checkpoints, what is known of "
        "images, failed steps' reports; null: nothing does",
    )
    state_volume: str | None = Field(
        None,
        description="or a PersistentVolumeClaim for the same, ReadWriteMany; pods have it in /retort-state",
    )
    s3_secret: str | None = Field(
        None, description="Kubernetes secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
    sign_secret: str | None = Field(
        None, description="Kubernetes secret with key.pem, which signs versions (registry.sign_key)"
    )
    mlflow_secret: str | None = Field(
        None,
        description="Kubernetes secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )

    @model_validator(mode="after")
    def _keeps_in_one_place(self) -> Kubeflow:
        if self.state and self.state_volume:
            raise PydanticCustomError(
                "two_places", "state and state_volume are two places: expected one of them"
            )
        return self

    @property
    def deadline_seconds(self) -> int:
        """``deadline_hours`` as Kubernetes takes it."""
        return max(1, round(self.deadline_hours * 3600))


class Params(Section):
    """The whole of ``params.yaml``. Every key has a default; a step takes the sections it reads."""

    general: Global = Field(default_factory=Global, alias="global")
    data: Data = Field(default_factory=Data)
    validation: Validate = Field(default_factory=Validate, alias="validate")
    audit: Audit = Field(default_factory=Audit)
    teacher: Net = Field(default_factory=Net)
    student: Net = Field(default_factory=Net)
    distill: Distill = Field(default_factory=Distill)
    export: Export = Field(default_factory=Export)
    benchmark: Benchmark = Field(default_factory=Benchmark)
    expand: Expand = Field(default_factory=Expand)
    compare_weights: CompareWeights = Field(default_factory=CompareWeights)
    tune: Tune = Field(default_factory=Tune)
    retrain: Retrain = Field(default_factory=Retrain)
    registry: Registry = Field(default_factory=Registry)
    ray: Ray = Field(default_factory=Ray)
    kubeflow: Kubeflow = Field(default_factory=Kubeflow)
    report: ReportSettings = Field(default_factory=ReportSettings)
    checks: Checks = Field(default_factory=Checks)

    def of(self, kind: type[S]) -> S:
        """The sections that one step reads, as the step's own parameter class."""
        return kind.model_validate(self.model_dump(by_alias=True))


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read a params file and apply ``a.b.c=value`` overrides (a value is YAML).

    Raises:
        ConfigError: naming the file or the override, the key, and the nearest known key or what the value
            should be; when an override would have a command run (``registry.notify``).
    """
    return build(_read(path), overrides, path)


def build(in_file: dict[str, Any], overrides: Sequence[str] = (), path: Path = Path("params.yaml")) -> Params:
    """The same of values that are no file yet; ``path`` is for errors."""
    values = copy.deepcopy(in_file)
    origin: dict[str, str] = {}
    for override in overrides:
        key, value = _split(override)
        _put(values, key, value, override)
        origin[key] = f"-o {override}"
    try:
        params = Params.model_validate(values, strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, origin, in_file)) from None
    own = in_file.get("registry")
    notify = params.registry.notify
    given = notify and notify != (own.get("notify") if isinstance(own, dict) else None)
    if given and not notify.startswith(("http://", "https://")):
        raise ConfigError(
            f"-o: registry.notify: a command is taken from {path} alone; write it there, or give a URL"
        )
    return params


def _holds(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse(_text(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; 'retort init DIR' writes a commented one, or give --params FILE"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: {_fault(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'data:', found {type(values).__name__}")
    # a section whose keys are all commented out is read as null: it means the defaults
    return {key: {} if value is None else value for key, value in values.items()}


def _text(path: Path) -> str:
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    try:
        if not wide:
            return content.decode("utf-8-sig")
        found = "UTF-16, or no text"
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"line {line} is not UTF-8"
    raise ConfigError(f"{path}: {found}; save it as UTF-8")


def parse(text: str) -> Any:
    """A value in YAML 1.2, as DVC reads it: ``1e-3`` is a number, ``no`` and ``1:30`` are words.

    Raises:
        YAMLError: the text is no YAML, or a key stands in it twice.
    """
    reader = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings(action="ignore", category=ReusedAnchorWarning):  # YAML allows it
            return reader.load(text)
    except RecursionError:
        raise YAMLError("not valid YAML: nested too deep") from None
    except DuplicateKeyError as error:
        raise YAMLError(_twice(reader.compose(text), set()) or _fault(error)) from None


def _twice(node: Node, seen: set[int]) -> str:
    """Says which key stands twice in a mapping, and where; empty when none does."""
    if id(node) in seen or not isinstance(node.value, list):
        return ""
    seen.add(id(node))  # an alias may lead back to it
    if not isinstance(node, MappingNode):
        return next(filter(None, (_twice(item, seen) for item in node.value)), "")
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in lines:
            where = f"{lines[name]} and on line {line}" if line > lines[name] else f"{line}"
            return f"key '{key.value}' stands twice, on line {where}; keep one of them"
        lines[name] = line
        if said := _twice(value, seen):
            return said
    return ""


def _fault(error: YAMLError) -> str:
    """What is wrong and where, in one line."""
    if not isinstance(error, MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = ", ".join(filter(None, (error.context, error.problem)))
    return f"not valid YAML: {where}{' '.join(said.split())}"


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-o {override}: expected KEY=VALUE, such as -o student.train.epochs=8")
    try:
        return key.strip(), parse(text)
    except YAMLError as error:
        raise ConfigError(f"-o {override}: {_fault(error)}") from None


def _put(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        inside = place.get(parent)
        # null: its keys are all commented out; a copy: an alias may have put the same section elsewhere too
        place[parent] = {} if inside is None else dict(inside) if isinstance(inside, dict) else inside
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(f"-o {override}: '{parent}' is a value, not a section")
    place[last] = value


def keys(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys with pydantic's FieldInfo each, sections included, in the order of the file."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{key}.")


def _origin(key: str, path: Path, origin: dict[str, str], in_file: dict[str, Any]) -> str:
    """What put ``key`` there, in a section or for a key below it too: an override, or the file."""
    for given, text in origin.items():
        if f"{key}.".startswith(f"{given}.") or (
            f"{given}.".startswith(f"{key}.") and not _holds(in_file, key)
        ):
            return text
    return str(path)


def _explain(error: ValidationError, path: Path, origin: dict[str, str], in_file: dict[str, Any]) -> str:
    known = [key for key, _ in keys()]
    lines = []
    for item in error.errors()[:2]:
        # pydantic appends the member of a union it tried to the location; keep what is a key
        parts = [str(part) for part in item["loc"]]
        full = ".".join(parts)
        where = _origin(full, path, origin, in_file)
        if item["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(full, known, n=1, cutoff=0.5)
            tail = [key for key in known if key.split(".")[-1] == parts[-1]]
            hint = nearest or tail[:1]
            mean = f"; did you mean '{hint[0]}'?" if hint else ""
            lines.append(f"{where}: unknown key '{full}'{mean}")
            continue
        while len(parts) > 1 and ".".join(parts) not in known:
            parts.pop()
        message = item["msg"][0].lower() + item["msg"][1:]
        got = "" if item["type"] in ("unknown_rule", "unknown_name") else f", got {SHORT.repr(item['input'])}"
        lines.append(f"{where}: {'.'.join(parts)}: {message}{got}")
    return "\n".join(dict.fromkeys(lines))
