"""The files of a pipeline or a network that diffusers saved, read and written without PyTorch."""

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.errors import ConfigError, in_short
from experiments.harness.paths import expanded

SOURCE, TARGET = "config.diffusers.source", "config.diffusers.target"
SIDECAR = "latent_variable_model.json"  # what diffusers' own files cannot say
STEM = "diffusion_pytorch_model"
UNET, SCHEDULER = "UNet2DModel", "scheduler_config.json"
_PICKLES = (".ckpt", ".pkl", ".pickle", ".pt", ".pth")
_TORCH = (2, 6)  # the first whose weights_only=True has no known hole
_BLOCK = 2**22


class Weights(Mapping):
    """Arrays by name, each read from its file when it is asked for.

    Args:
      readers: a function that reads the array, for each name.
    """

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]):
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class Pipeline(NamedTuple):
    """A saved network, with the scheduler and the sidecar that lie beside it.

    Attributes:
      unet: the options of the `UNet2DModel`.
      scheduler: those of the scheduler; None for a network without one.
      sidecar: the content of our sidecar; None for a pipeline that another program wrote.
      weights: the weights by diffusers' names.
      files: the SHA-256 digest of every file that was read, by path.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any] | None
    sidecar: dict[str, Any] | None
    weights: Mapping[str, np.ndarray]
    files: Mapping[str, str] = MappingProxyType({})


def load(source: str) -> Pipeline:
    """Opens a saved pipeline, a flat folder of its files, or the folder of a network alone.

    Args:
      source: the folder.

    Raises:
      ConfigError: with one line, if a file is missing or damaged, or it is another kind of model.
    """
    root = Path(expanded(source, SOURCE))
    if root.suffix in _PICKLES:
        raise ConfigError(
            f"{SOURCE} = {source!r} is a pickle, which can run any code and is never opened; save "
            "the model with diffusers' save_pretrained(…, safe_serialization=True)"
        )
    if not root.is_dir():
        raise ConfigError(
            f"{SOURCE} = {source!r} is no folder; give one that diffusers' save_pretrained wrote, "
            "or that hf download NAME --local-dir PATH fetched"
        )
    index = root / "model_index.json"
    if index.exists():
        _check_components(index, _read_json(index))
    folder = root / "unet" if (root / "unet").is_dir() else root
    schedulers = (root / "scheduler" / SCHEDULER, root / SCHEDULER)
    scheduler = next((path for path in schedulers if path.exists()), None)
    unet = _read_json(folder / "config.json")
    if (kind := unet.get("_class_name", UNET)) != UNET:
        reasons = {
            "UNet2DConditionModel": "its network receives a text or another condition",
            "AutoencoderKL": "it is an autoencoder",
            "VQModel": "it is an autoencoder",
        }
        reason = reasons.get(kind, "it is another architecture")
        raise ConfigError(f"{folder / 'config.json'} is of a {kind}: {reason}; only {UNET} is read")
    paths, weights = _weights(folder)
    texts = [path for path in (folder / "config.json", scheduler, root / SIDECAR) if path]
    paths = [path for path in (*texts, *paths) if path.exists()]
    return Pipeline(
        unet,
        _read_json(scheduler) if scheduler else None,
        _read_json(root / SIDECAR) if (root / SIDECAR).exists() else None,
        weights,
        {str(path.relative_to(root)): _digest(path) for path in paths},
    )


def _check_components(path: Path, index: dict[str, Any]) -> None:
    """Raises ConfigError for a pipeline of more than a network and a scheduler."""
    parts = {
        name
        for name, part in index.items()
        if not name.startswith("_") and isinstance(part, list) and any(part)
    }
    if text := parts & {"text_encoder", "tokenizer", "bert", "prior"}:
        raise ConfigError(
            f"{path} lists {min(text)}: a text-conditional model has no bound on log p(image) "
            "without a text for each image; only unconditional and class-conditional ones are read"
        )
    if latent := parts & {"vae", "vqvae", "autoencoder"}:
        raise ConfigError(
            f"{path} lists {min(latent)}: its network denoises latents, and a bound on their "
            "density is not one on pixels: that needs the autoencoder's terms too"
        )
    if others := parts - {"unet", "scheduler"}:
        raise ConfigError(f"{path} lists {min(others)}, which is unknown; known: unet, scheduler")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{SOURCE}: {path} is missing; it holds the options") from error
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{SOURCE}: {path} cannot be read ({in_short(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{SOURCE}: {path} holds no JSON object")
    return content


def _weights(folder: Path) -> tuple[list[Path], Weights]:
    """The files of the weights, and the weights."""
    for ending, read in ((".safetensors", _safetensors), (".bin", _torch)):
        index = folder / f"{STEM}{ending}.index.json"
        if index.exists():
            mapping = _read_json(index).get("weight_map", {})
            paths = [folder / name for name in sorted(set(map(str, mapping.values())))]
        else:
            paths = [folder / f"{STEM}{ending}"]
            paths += [] if paths[0].exists() else sorted(folder.glob(f"{STEM}.*{ending}"))[:1]
            paths = [path for path in paths if path.exists()]
        if paths:
            if missing := [path for path in paths if not path.is_file()]:
                raise ConfigError(f"{SOURCE}: {missing[0]} is missing; {index.name} lists it")
            readers = {}
            for path in paths:
                readers |= read(path)
            return [*paths, index], Weights(readers)
    raise ConfigError(
        f"{SOURCE}: {folder} holds no weights; expected {STEM}.safetensors, its shards with an "
        f"index, or {STEM}.bin"
    )


def _safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of the arrays of a file; the whole file is checked against its header."""
    safetensors = _require("safetensors")
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{SOURCE}: {path} is damaged or incomplete ({in_short(error)}); fetch it again"
        ) from error
    # NumPy has bfloat16 from a package that JAX imports.
    return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _torch(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of a file that torch.save wrote; nothing but arrays is unpickled."""
    torch = _require("torch")
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH:
        raise ConfigError(
            f"{SOURCE}: {path} is a pickle, and torch {torch.__version__} does not open it safely; "
            "use torch >= 2.6, or weights in safetensors"
        )
    try:
        arrays = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: lambda a=array: a.float().numpy() for name, array in dict(arrays).items()}
    except Exception as error:
        raise ConfigError(f"{SOURCE}: {path} cannot be read ({in_short(error)})") from error


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"the weights need the package {package}: pip install {package}"
        ) from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def save(target: str, pipeline: Pipeline) -> None:
    """Writes a pipeline as diffusers' save_pretrained does, whole or not at all.

    Args:
      target: a folder that does not exist.
      pipeline: its weights, options and sidecar.

    Raises:
      ConfigError: if the folder exists or cannot be written.
    """
    check_target(target)
    root = Path(expanded(target, TARGET))
    partial = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", UNET],
        "scheduler": ["diffusers", pipeline.scheduler["_class_name"]],
    }
    texts = {
        "model_index.json": index,
        "unet/config.json": {"_class_name": UNET} | pipeline.unet,
        f"scheduler/{SCHEDULER}": pipeline.scheduler,
        SIDECAR: pipeline.sidecar,
    }
    save_file = _require("safetensors.numpy").save_file
    try:
        for name, content in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        # diffusers asks for this entry.
        save_file(dict(pipeline.weights), partial / f"unet/{STEM}.safetensors", {"format": "pt"})
        partial.rename(root)
    except OSError as error:
        raise ConfigError(f"{TARGET} = {target!r} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: str) -> None:
    """Raises ConfigError unless a pipeline can be written there."""
    if not target:
        raise ConfigError(f"{TARGET} = ''; name the new folder for the pipeline")
    if Path(expanded(target, TARGET)).exists():
        raise ConfigError(f"{TARGET} = {target!r} exists; name a new folder")
    _require("safetensors")
