"""Compile meshlocal/proxy/bypass/program.c, by clang, to the instructions beside it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "meshlocal" / "proxy" / "bypass"
SOURCE = FOLDER / "program.c"
PROGRAMS = ("connect4", "connect6")
FLAGS = ("-O2", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror")


def compile_programs(clang: str, objcopy: str, folder: Path) -> dict[str, bytes]:
    """File name → instructions.

    Args:
        clang: the compiler.
        objcopy: llvm-objcopy.
        folder: for what is in between.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    # Where Debian has the kernel's headers that go with the machine; the program uses nothing of them.
    machine = next(Path("/usr/include").glob("*-linux-gnu"), Path("/usr/include"))
    compiled = folder / "program.o"
    subprocess.run([clang, *FLAGS, f"-I{machine}", "-c", str(SOURCE), "-o", str(compiled)], check=True)
    made = {}
    for name in PROGRAMS:
        part = folder / f"{name}.bin"
        command = [objcopy, "-O", "binary", f"--only-section=cgroup/{name}", str(compiled), str(part)]
        subprocess.run(command, check=True)
        made[part.name] = part.read_bytes()
    return made


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = compile_programs("clang", "llvm-objcopy", Path(folder))
    for name, code in made.items():
        (FOLDER / name).write_bytes(code)
        print(f"{name}: {len(code) // 8} instructions")


if __name__ == "__main__":
    main()
