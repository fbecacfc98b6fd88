"""Build the sdist and the wheel into dist/, and try the wheel in a new virtual environment, outside of the checkout.

The wheel is built from the unpacked sdist, so that a file that the sdist lacks is missing in the wheel, too. By
default, the new environment takes the dependencies from the environment of this script, which needs no network. With
--clean, it installs them from the package index. In both cases, pip checks that every dependency of the wheel is
present.

Usage: make build, or python .ci/build.py [--clean] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ("LICENSE", "CITATION.cff", "Makefile", "docs/api.md", "tests/test_public_api.py", "recipes/quickstart.yaml")
TRY = """
import pathlib, sys
from importlib.metadata import version

import kedit_train
from kedit_train import EditDataset, load_model

package = pathlib.Path(kedit_train.__file__).parent
assert package.is_relative_to(sys.prefix), f"imported {package} instead of the wheel"
assert (package / "py.typed").is_file(), "py.typed is missing"
assert version("kedit-train") == kedit_train.__version__
model, tokenizer = load_model("world")
edit = EditDataset.load("world", limit=1)[0]
output = model.generate(**tokenizer(edit.prompt, return_tensors="pt"), max_new_tokens=2, do_sample=False)
print(f"{edit.prompt!r} -> {tokenizer.decode(output[0])!r}")
"""


def build(out: Path, work: Path) -> Path:
    """Build the sdist from the checkout and the wheel from the sdist. Return the path of the wheel."""
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run([*hatchling, "-t", "sdist"], cwd=ROOT, check=True)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(work, filter="data")
    source = work / sdist.name.removesuffix(".tar.gz")
    missing = [name for name in EXPECTED if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"the sdist lacks {', '.join(missing)}; see tool.hatch.build.targets.sdist in pyproject.toml")
    subprocess.run([*hatchling, "-t", "wheel"], cwd=source, check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, *, clean: bool) -> Path:
    """Install the wheel into a new virtual environment. Return the folder of its commands."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    if clean:
        subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], check=True)
        return python.parent
    # A line in a .pth file adds a folder to sys.path. The .pth files in that folder are not read, so an editable
    # installation of the checkout stays invisible.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--no-index", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    # The wheel is installed now. pip fails here if a dependency is missing or has a version that the wheel refuses.
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    return python.parent


def try_wheel(commands: Path, folder: Path) -> None:
    """Run the installed commands and load the bundled model in a folder that is not the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in (
        ["kedit", "--version"],
        ["kedit", "ls", "recipes"],
        ["kedit", "validate", "quickstart", "kedit_default", "callbacks/kl_locality"],
        ["python", "-c", TRY],
    ):
        words = [str(commands / command[0]), *command[1:]]
        subprocess.run(words, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="install the dependencies from the package index")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the sdist and the wheel")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("kedit_train-*.tar.gz"), *args.out.glob("kedit_train-*.whl")):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = build(args.out.resolve(), work)
        try_wheel(install(wheel, work / "venv", clean=args.clean), work)
    print(f"built and tried {wheel.name} and its sdist, in {args.out}")


if __name__ == "__main__":
    main()
