"""The tool that the IR tests use."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch_mlir import ir

from spikingbrain.errors import OptionError
from spikingbrain.passes import pipeline
from spikingbrain.passes.base import PassContext, parse_pass
from spikingbrain.tools import opt

LINEAR = """
func.func @main(%x: tensor<3x4xf32>, %w: tensor<6x4xf32>) -> tensor<3x6xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 6 : i64} : (tensor<3x4xf32>, tensor<6x4xf32>) -> tensor<3x6xf32>
  return %y : tensor<3x6xf32>
}
"""
COMPUTED_WEIGHT = """
!x = !torch.vtensor<[3,4],f32>
!w = !torch.vtensor<[6,4],f32>
!y = !torch.vtensor<[3,6],f32>
func.func @main(%x: !x, %w: !w) -> !y {
  %none = torch.constant.none
  // expected-remark@+1 {{raise-linear: the weight is computed by the model, not stored}}
  %y = torch.aten.linear %x, %w, %none : !x, !w, !torch.none -> !y
  return %y : !y
}
"""
WRONG = "func.func @main(%x: tensor<3xf32>) -> tensor<4xf32> {\n  return %x : tensor<3xf32>\n}\n"

Opt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Opt:
    """Returns ``run(text, *arguments)`` -> exit code, standard output, standard error."""

    def call(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = opt.main(list(arguments))
        return code, *capsys.readouterr()

    return call


def test_runs_passes_in_the_order_given(run: Opt) -> None:
    code, out, err = run(LINEAR, "-p", "pack-weights,lower-linear")
    assert (code, err) == (0, "")
    assert "linalg.generic" in out and "spikingbrain.linear" not in out


def test_no_pass_prints_the_input(run: Opt) -> None:
    code, out, _ = run(LINEAR)
    assert code == 0 and "spikingbrain.linear" in out


def test_the_whole_pipeline(run: Opt) -> None:
    code, out, _ = run(COMPUTED_WEIGHT, "-p", "all", "--clean")
    assert code == 0 and "torch" not in out


def test_list_has_every_pass_in_order(run: Opt) -> None:
    code, out, _ = run("", "--list")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == [p.name for p in pipeline.default_pipeline()]
    assert all(len(line.split()) > 3 for line in out.splitlines()), "a pass without a summary"


def test_unknown_pass(run: Opt) -> None:
    code, out, err = run(LINEAR, "-p", "raise-spirits")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: unknown pass 'raise-spirits'\n  try: one of decompose-attention, fuse-into-recurrence, "
    )


def test_unknown_option(run: Opt) -> None:
    code, _, err = run(LINEAR, "-p", "lower-linear{speed=9}")
    assert (code, err) == (2, "error: pass 'lower-linear' has no option 'speed'\n  try: its options: none\n")


@dataclass(frozen=True)
class Optioned:
    """A pass with options."""

    name: ClassVar[str] = "optioned"
    block_size: int = 8
    exact: bool = False
    mode: str = "fast"

    def run(self, module: ir.Module, context: PassContext) -> None: ...


def test_options_have_the_types_of_their_fields() -> None:
    known = {"optioned": Optioned}
    assert parse_pass("optioned", known) == Optioned()
    assert parse_pass("optioned{block-size=-4 exact=true, mode=slow}", known) == Optioned(-4, True, "slow")
    assert parse_pass("optioned{exact=0}", known) == Optioned(exact=False)
    with pytest.raises(OptionError, match="option 'block_size' of pass 'optioned' is an integer, not 'big'"):
        parse_pass("optioned{block-size=big}", known)
    with pytest.raises(OptionError, match="its options: block_size, exact, mode"):
        parse_pass("optioned{size=4}", known)


def test_unknown_target(run: Opt) -> None:
    from spikingbrain.errors import TargetError

    with pytest.raises(TargetError, match="unknown target 'abacus'"):
        run(LINEAR, "--target", "abacus")


def test_missing_file(run: Opt, tmp_path: Path) -> None:
    code, _, err = run("", str(tmp_path / "none.mlir"))
    assert code == 2 and err == f"error: cannot read {tmp_path / 'none.mlir'}: No such file or directory\n"


def test_split_input_file(run: Opt) -> None:
    """Each part is a module of its own; a wrong one does not stop the others."""
    code, out, err = run("// -----\n".join([LINEAR, WRONG, LINEAR]), "--split-input-file")
    assert code == 1
    assert out.count("func.func @main") == 2 and out.count("// -----") == 1
    assert err == (
        "error: line 3: type of return operand 0 ('tensor<3xf32>') doesn't match function result type"
        " ('tensor<4xf32>') in function @main\n"
    )


def test_syntax_error_names_the_line(run: Opt) -> None:
    code, out, err = run("func.func @main() {\n  nonsense\n}\n")
    assert (code, out) == (1, "") and err.startswith("error: line 2: ")


def test_input_is_verified_unless_told_otherwise(run: Opt) -> None:
    launch = '"spikingbrain_control.launch"() : () -> ()\n'
    code, _, err = run(launch)
    assert code == 1 and "'spikingbrain_control.launch' op needs the attributes callee and tied" in err
    assert run(launch, "--no-verify")[0] == 0


def test_a_pass_that_breaks_the_module_is_named(run: Opt, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Break:
        """Breaks the module."""

        name: ClassVar[str] = "break"

        def run(self, module: ir.Module, context: PassContext) -> None:
            with module.context, ir.Location.unknown(), ir.InsertionPoint(module.body):
                ir.Operation.create("spikingbrain_control.launch")

    monkeypatch.setitem(pipeline.PASSES, "break", Break)
    code, _, err = run(LINEAR, "-p", "break")
    assert code == 1 and err.startswith(
        "error: line 0: pass break left invalid IR because: 'spikingbrain_control.launch'"
    )
    assert run(LINEAR, "-p", "break", "--no-verify")[0] == 0


def test_time_passes(run: Opt) -> None:
    _, _, err = run(LINEAR, "-p", "pack-weights,lower-linear", "--time-passes")
    assert re.fullmatch(r" *\d+\.\d{4} s  pack-weights\n *\d+\.\d{4} s  lower-linear\n", err)


def test_dump_each(run: Opt, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dumps"
    run(LINEAR, "-p", "pack-weights,lower-linear", "--dump-each", str(folder))
    assert sorted(f.name for f in folder.iterdir()) == ["01-pack-weights.mlir", "02-lower-linear.mlir"]
    assert "spikingbrain.linear" in (folder / "01-pack-weights.mlir").read_text()
    assert "linalg.generic" in (folder / "02-lower-linear.mlir").read_text()


def test_remarks(run: Opt) -> None:
    _, _, err = run(COMPUTED_WEIGHT, "-p", "raise-linear", "--remarks")
    assert (
        err
        == "-:8: raise-linear: refused torch.aten.linear the weight is computed by the model, not stored\n"
    )


def test_verify_diagnostics_accepts_what_is_expected(run: Opt) -> None:
    assert run(COMPUTED_WEIGHT, "-p", "raise-linear", "--verify-diagnostics") == (0, "", "")


def test_verify_diagnostics_reports_what_did_not_appear(run: Opt) -> None:
    code, _, err = run(COMPUTED_WEIGHT, "--verify-diagnostics")
    assert code == 1 and err.startswith("line 8: expected remark 'raise-linear: the weight is computed")


def test_verify_diagnostics_reports_an_unexpected_error(run: Opt) -> None:
    code, _, err = run(WRONG, "--verify-diagnostics")
    assert code == 1 and err.startswith('line 2: unexpected error "type of return operand 0')


def test_verify_diagnostics_wants_the_right_line(run: Opt) -> None:
    code, _, err = run(COMPUTED_WEIGHT.replace("@+1", "@+2"), "-p", "raise-linear", "--verify-diagnostics")
    assert code == 1 and "line 9: expected remark" in err
