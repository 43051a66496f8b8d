"""The AMX code as it was compiled, read back with a disassembler: what no emulation of it can show."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from pymm.ops._extension import require_extension


def _objdump(*options: str) -> str:
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("needs objdump")
    extension = require_extension()
    if "amx" not in extension.compiled_isas() or extension.build_info()["amx"] != "native":
        pytest.skip("needs a build with the tile instructions")
    command = [tool, *options, extension.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def code() -> str:
    return _objdump("-d", "--no-show-raw-insn", "-w")


def _registers(code: str, mnemonic: str) -> set[tuple[int, ...]]:
    """`(target, a, b)` of each such instruction; the disassembler names them in reverse."""
    found = re.findall(rf"\t{mnemonic} +%tmm(\d),%tmm(\d),%tmm(\d)", code)
    return {tuple(map(int, reversed(registers))) for registers in found}


def test_float16_products_are_those_of_bfloat16(code: str) -> None:
    """The bytes written out for TDPFP16PS name the registers that were meant."""
    if "tdpfp16ps" not in code:
        assert "(bad)" in code, "no TDPFP16PS was compiled"
        pytest.skip("this objdump does not know AMX-FP16")
    products = _registers(code, "tdpbf16ps")
    assert products == {(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)} | {(i, 6, 7) for i in range(6)}
    assert _registers(code, "tdpfp16ps") == products


def test_configuration_is_whole_when_it_is_loaded(code: str) -> None:
    """LDTILECFG faults on a configuration of which a byte was not written; a constant is always whole."""
    places = re.findall(r"\tldtilecfg +(.*)", code)
    assert places
    addresses = set()
    for place in places:
        constant = re.search(r"\(%rip\) +# ([0-9a-f]+)", place)
        assert constant, f"a configuration is built where it is used: {place}"
        addresses.add(int(constant[1], 16))
    for address in addresses:
        dump = _objdump("-s", f"--start-address={address:#x}", f"--stop-address={address + 64:#x}")
        lines = re.findall(r"^ [0-9a-f]+ ((?:[0-9a-f]{8} ?)+) ", dump, flags=re.MULTILINE)
        held = bytes.fromhex("".join(lines).replace(" ", ""))
        eight_rows_of_64_bytes = bytes(8 * [64, 0]) + bytes(16)
        assert held == bytes([1, *15 * [0]]) + eight_rows_of_64_bytes + bytes(8 * [16]) + bytes(8)


def test_every_configuration_is_released(code: str) -> None:
    for function in code.split("\n\n"):
        if "\tldtilecfg " in function:
            assert "\ttilerelease" in function, function.partition("\n")[0]
