"""The CPU's compiled functions: found, built once, and replaced by plain torch without a compiler."""

import shutil

import pytest
import torch
from flat_operators import ops, reference

from dq_kernels.cpu import compiled


def assert_exact(conv2d_arguments):
    arguments, _ = conv2d_arguments((2, 8, 8, 34), 9)
    assert torch.equal(ops.int4_conv2d(**arguments)[0], reference.int4_conv2d(**arguments)[0])


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (compiled.library, compiled._cache_folder):
        function.cache_clear()
    yield
    for function in (compiled.library, compiled._cache_folder):
        function.cache_clear()


def only_compiler(folder, monkeypatch, script):
    """Makes a script the only compiler."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", str(path))


def test_without_a_compiler_layers_run_in_plain_torch_and_say_so(conv2d_arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.warns(UserWarning, match=r"several times slower: no C\+\+ compiler was found"):
        assert_exact(conv2d_arguments)


def test_compiler_that_fails_is_named_with_its_message(conv2d_arguments, monkeypatch, tmp_path):
    only_compiler(tmp_path, monkeypatch, "echo no such header >&2; exit 1")

    with pytest.warns(UserWarning, match=r"c\+\+ failed: .*no such header"):
        assert_exact(conv2d_arguments)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_option_that_the_compiler_does_not_take_is_left_out(monkeypatch, tmp_path, recwarn):
    real = shutil.which("c++")
    script = f'for option; do [ "$option" = -march=native ] && exit 1; done; exec {real} "$@"'
    only_compiler(tmp_path, monkeypatch, script)

    assert compiled.library() is not None
    assert not recwarn.list


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_library_is_built_once_a_machine(monkeypatch, tmp_path):
    assert compiled.library() is not None
    [built] = (tmp_path / "dq_runtime").iterdir()
    made = built.stat().st_mtime_ns
    compiled.library.cache_clear()

    assert compiled.library() is not None

    assert [path.stat().st_mtime_ns for path in (tmp_path / "dq_runtime").iterdir()] == [made]
