"""What every test shares: eight simulated CPU devices, a compilation cache that outlives the run, and a tiny model with
weights, tokenizer and screens. Nothing here may be changed in place."""

import contextlib
import gc
import importlib.util
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Read when JAX is imported, so before anything else. The cache makes a second run of the suite several times faster.
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers of one run have cores of their own: XLA's threads wait by spinning, which others pay for.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    number = worker.removeprefix("gw")
    if len(cores) >= workers and number.isdecimal():  # one that stands in for a dead one counts on
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores[int(number) % workers :: workers])
# A shell starts what it puts into the background with SIGINT ignored; tests of Ctrl-C, and what they start, need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Most of a first run is compilation: programs that run for milliseconds are compiled in haste.
HASTE = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HASTE}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / version("jax")))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Minutes each: they come first, so that no worker has one to itself when the others are done.
LONG = [
    f"test_{name}.py"
    for name in ("quickstart", "train", "configs", "mesh", "parallel", "examples", "resume", "sight", "benchmarks")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of = {ROOT / "tests" / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: of.get(item.path, len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs go with the file that compiled them. Each is mapped into memory in many pieces, and a process
    may have 65,530 of those: the whole suite comes near that, and one more aborts it."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data (real photographs and small real weights); the test skips where it is absent."""
    path = Path(os.environ.get("HYPERVL_SHARED", ROOT.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set HYPERVL_SHARED")
    return path.parent


# Imports stay inside: the jaxtyping hook must be installed before the first of them.


@pytest.fixture(scope="session")
def tiny_config():
    """Everything at the size of a unit test."""
    from hypervl_jax import presets

    return presets.tiny()


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random weights, norms and biases too, so that none of them can be left out unnoticed. No VRC."""
    import jax.numpy as jnp
    import numpy as np

    from hypervl_jax import checkpoint, tensors

    rng = np.random.default_rng(0)
    shapes = {k: v for k, v in checkpoint.expected(tiny_config.model).items() if not k.startswith("vrc.")}

    def draw(name, shape):
        if name.split(".")[-1] in ("embed", "head", "pos"):
            return 0.3 * rng.normal(size=shape)
        if name.endswith("bias"):
            return rng.uniform(-0.3, 0.3, shape)
        if "norm" in name:
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(size=shape) / shape[-1] ** 0.5

    return tensors.unflatten({k: jnp.asarray(draw(k, s), jnp.float32) for k, s in sorted(shapes.items())})


class Records:
    """A `pipeline.Source` in memory: the first screens or sheets of the training split, as the builder makes them."""

    def __init__(self, composer, cfg, count):
        import numpy as np

        from hypervl_jax.data.assets import Assets

        self.records = [composer.record(Assets.load(), cfg, "train", i) for i in range(count)]
        self.sizes = np.array([s.image.shape[:2] for s in self.records])

    def __getitem__(self, index):
        return self.records[index]

    def __len__(self):
        return len(self.records)


@pytest.fixture(scope="session")
def tiny_source(tiny_config):
    from hypervl_jax.data import screens

    return Records(screens, tiny_config.data.screens, 24)


@pytest.fixture(scope="session")
def tiny_sheets(tiny_config):
    """What stage 0 of training sees."""
    from hypervl_jax.data import sheets

    return Records(sheets, tiny_config.data.screens, 8)


@pytest.fixture(scope="session")
def tiny_classes(tiny_config):
    """What the image-name term tells apart: the concepts and the digits."""
    from hypervl_jax.data import pipeline
    from hypervl_jax.data.assets import Assets

    return (*Assets.load().words[: tiny_config.data.screens.concepts], *pipeline.DIGITS)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_source):
    from hypervl_jax import tokens

    return tokens.train_tokenizer(t for s in tiny_source.records for q in s.questions for t in (q.text, q.answer) * 2)


@pytest.fixture(scope="session")
def tiny_batches(tiny_config, tiny_source, tiny_tokenizer, tiny_classes):
    """The first training batches, as Grain delivers them."""
    from hypervl_jax.data import pipeline

    m, d = tiny_config.model, tiny_config.data
    return list(pipeline.batches(tiny_source, d, m.policy, m.text, tiny_tokenizer, tiny_classes, 0, 6))


@pytest.fixture(scope="session")
def tiny_model(tiny_config, tiny_params, tiny_tokenizer):
    """A whole model that knows nothing."""
    import jax

    from hypervl_jax import config
    from hypervl_jax.checkpoint import Model
    from hypervl_jax.model import vrc

    info = {"config": config.to_dict(tiny_config), "vrc_scale": 0.9}
    net = vrc.init(jax.random.key(0), tiny_config.model.vrc)
    return Model(tiny_config.model, tiny_params | {"vrc": net}, tiny_tokenizer, info)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):
    """The same on disk. Nothing may write to it."""
    from hypervl_jax import checkpoint

    m = tiny_model
    return checkpoint.save_model(tmp_path_factory.mktemp("saved") / "model", m.config, m.params, m.tokenizer, m.info)


@pytest.fixture(scope="session")
def tiny_picture(tiny_source, tmp_path_factory):
    """A screen as a PNG file."""
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "screen.png"
    Image.fromarray(tiny_source[3].image).save(path)
    return path


@pytest.fixture(scope="module")
def load():
    """Imports a script of `benchmarks/` the way running it does: with its folder on the path."""
    folder, before = Path(__file__).parents[1] / "benchmarks", set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    sys.path.insert(0, str(folder))
    yield load
    sys.path.remove(str(folder))
    for name in {p.stem for p in folder.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def as_published():
    """Writes the weights of a pair as published files have them: kernels in PyTorch's order, .npz."""
    import numpy as np

    from hypervl_jax.tensors import flatten

    def as_published(pair, path):
        theirs = {k: np.asarray(v) for k, v in flatten(pair.params).items()}
        theirs = {
            k: np.moveaxis(v, (-3, -4, -2, -1), (-1, -2, -3, -4)) if v.ndim >= 4 else v for k, v in theirs.items()
        }
        np.savez(path, **theirs)
        return path

    return as_published
