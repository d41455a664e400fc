"""``dq-runtime doctor``: every operator is checked, and a wrong one is found."""

import flat_operators
import pytest
import torch

from dq_kernels import ops, self_check


def test_every_operator_is_checked_and_passes(run_json):
    report = run_json("doctor", "--device", "cpu")

    assert report["operators"].keys() == set(flat_operators.OPERATORS)
    assert all(check["passed"] for check in report["operators"].values()), report["operators"]
    assert report["versions"]["torch"] == torch.__version__
    assert "oneDNN" in report["kernels"]["backend"]


@pytest.mark.parametrize("operator", flat_operators.OPERATORS)
def test_a_wrong_result_is_found(monkeypatch, operator):
    original = getattr(ops, operator)

    def wrong(*arguments):
        result = original(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        first.view(-1)[:3] += 3
        return result

    monkeypatch.setattr(ops, operator, wrong)

    failed = [check.operator for check in self_check.check_operators(torch.device("cpu")) if not check.passed]

    assert failed == [operator]


def test_a_failing_operator_is_a_finding_with_exit_code_1(run, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, "int4_linear", fail)

    output = run("doctor", "--device", "cpu", code=1).stdout

    assert "FAIL" in output
    assert "no kernel image" in output
    assert output.count("PASS") == len(flat_operators.OPERATORS) - 1
