"""The wheel: what is in it, and that it works away from the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import dst_optax._version

for needed in (
    "build",
    "gin",
    "seqio",
    "orbax.checkpoint",
    "clu",
    "rich",
    "tensorboard",
    "matplotlib",
    "typer",
):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
PACKAGES = ("dst_optax", "t5x_integration")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel made from it."""
    out, checkout = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """``bin`` of an environment with the wheel, and this one's packages but for the checkout."""
    where = tmp_path_factory.mktemp("env") / "env"
    venv.create(where, with_pip=False)
    purelib = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(where)}))
    others = {p for p in sys.path if p.endswith("site-packages")}
    (purelib / "others.pth").write_text("\n".join(sorted(others)))
    pip = [sys.executable, "-m", "pip", "--python", str(where), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", "-q", str(built[0])], check=True)
    return where / ("Scripts" if os.name == "nt" else "bin")


def run(bin_directory, cwd, *command):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    env |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [bin_directory / command[0], *command[1:]], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_wheel_has_the_package_and_its_gin_files_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    package = {
        str(p.relative_to(ROOT))
        for top in PACKAGES
        for pattern in ("*.py", "*.gin", "py.typed", "requirements.txt")
        for p in (ROOT / top).rglob(pattern)
    }
    assert "dst_optax/finetuning/configs/dst.gin" in package
    assert {n for n in names if ".dist-info/" not in n} == package


def test_the_source_distribution_can_be_built_and_read(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "dst_optax/finetuning/configs/dst.gin"} <= names


def test_one_version_everywhere(built):
    version = dst_optax._version.__version__
    assert all(re.search(rf"dst_optax-{re.escape(version)}[-.]", path.name) for path in built)


def test_commands_work_away_from_the_checkout(installed, tmp_path):
    where = run(installed, tmp_path, "python", "-c", "import dst_optax; print(dst_optax.__file__)").stdout
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "finetune" in run(installed, tmp_path, "dst-optax", "--help").stdout
    assert "--topology" in run(installed, tmp_path, "dst-optax", "plan", "--help").stdout
    quick = ["--gin.STEPS=2", "--gin.EVAL_EVERY=2", "--gin.BATCH_SIZE=2", "--gin.TASKS=['rte']"]
    small = ["--gin.LENGTHS={'inputs': 16, 'targets': 16}", "--gin.sources.SyntheticSource.train_size=8"]
    flags = ["--gin_file=quickstart_seed.gin", "--gin_file=configs/dst.gin", "--gin.FRACTION=0.1"]
    run(installed, tmp_path, "dst-optax", "finetune", *flags, *quick, *small, "--gin.RUN_DIR='run'")
    tuned = "run/dst/rng_0/tuned/subset"
    shown = json.loads(run(installed, tmp_path, "dst-optax", "subset", "inspect", tuned, "--json").stdout)
    assert 0 < shown["entries"] < 0.11 * shown["parameters"]


T5X = """
import sys
import t5x_stub

path = __path__
t5x_stub.install()
sys.modules["t5x"].__path__ = path
sys.modules.pop("t5x.train", None)
"""


def test_t5x_finds_the_gin_files_in_the_wheel(installed, tmp_path):
    shutil.copy(ROOT / "tests" / "integration_t5x" / "t5x_stub.py", tmp_path)
    (tmp_path / "t5x").mkdir()
    (tmp_path / "t5x" / "__init__.py").write_text(T5X)
    program = "import gin\nprint(gin.parse_config_file('configs/t5x/superglue_tasks.gin').imports)\n"
    (tmp_path / "t5x" / "train.py").write_text(program)
    assert "t5x_integration.tasks" in run(installed, tmp_path, "python", "-m", "t5x_integration.train").stdout
