"""What installs, under which names, and who imports whom."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dq_runtime

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"dq_kernels": REPOSITORY / "kernels", "dq_runtime": REPOSITORY / "dq_runtime"}


def sources(package):
    """Path of every module by its dotted name."""
    root = PACKAGES[package]
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


MODULES = {name: path for package in PACKAGES for name, path in sources(package).items()}


def imports(source, lazy=True):
    """Dotted names that a module imports; without ``lazy`` only those that importing it runs.

    ``from a.b import c`` gives ``a.b.c``: c may be a module. What only type checkers see is left out of the latter.
    """
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not read here"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        elif not lazy and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def is_in(name, package):
    return f"{name}.".startswith(f"{package}.")


EVERY_FORM = """
import a
import b.c as d, e
from f import g
if TYPE_CHECKING:
    from h import i
else:
    import j
try:
    import k
except ImportError:
    pass
class C:
    import l
    def method(self):
        import m
"""


def test_the_reader_of_imports_sees_every_form():
    at_import = {"a", "b.c", "e", "f.g", "j", "k", "l"}

    assert imports(EVERY_FORM, lazy=False) == at_import
    assert imports(EVERY_FORM) == at_import | {"h.i", "m"}
    with pytest.raises(AssertionError, match="relative"):
        imports("from . import a")


def test_there_are_modules_to_read():
    assert {"dq_kernels", "dq_kernels.ops", "dq_runtime", "dq_runtime.calibration.calibrate"} <= MODULES.keys()


@pytest.mark.parametrize("module", sources("dq_kernels"))
def test_kernels_know_torch_and_triton_alone(module):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "dq_kernels"}

    assert {name.partition(".")[0] for name in imports(MODULES[module].read_text())} <= allowed


@pytest.mark.parametrize("module", sources("dq_runtime"))
def test_the_runtime_reaches_kernels_through_ops_alone(module):
    kernels = {name for name in imports(MODULES[module].read_text()) if is_in(name, "dq_kernels")}

    allowed = ["dq_kernels.ops", *(["dq_kernels.self_check"] if module == "dq_runtime.cli.doctor" else [])]
    assert all(any(is_in(name, package) for package in allowed) for name in kernels), kernels


def test_the_runtime_uses_the_kernels():
    everything = {name for module in sources("dq_runtime") for name in imports(MODULES[module].read_text())}

    assert "dq_kernels.ops" in everything


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in sources("dq_runtime")
        if not any(is_in(name, f"dq_runtime.{package}") for package in ("calibration", "cli"))
    ],
)
def test_inference_imports_no_calibration(module):
    found = imports(MODULES[module].read_text(), lazy=False)

    assert not {name for name in found if is_in(name, "dq_runtime.calibration")}


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in sources("dq_runtime")
        if not any(is_in(name, f"dq_runtime.{package}") for package in ("calibration", "evaluation", "cli"))
    ],
)
def test_inference_imports_no_evaluation(module):
    assert not {name for name in imports(MODULES[module].read_text()) if is_in(name, "dq_runtime.evaluation")}


@pytest.mark.parametrize("module", [name for name in MODULES if not is_in(name, "dq_runtime.cli")])
def test_nothing_imports_the_command_line(module):
    found = {name for name in imports(MODULES[module].read_text()) if is_in(name, "dq_runtime.cli")}

    assert not found or module == "dq_runtime.__main__"


def layout():
    """The modules in the order of the map in CONTRIBUTING, from top to bottom."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    block = text.split("## Layout")[1].split("```")[1]
    package, modules = None, []
    for line in block.strip().splitlines():
        path = line.split()[0]
        if not line.startswith(" "):
            package = {"dq_runtime/": "dq_runtime", "kernels/": "dq_kernels"}.get(path)
        elif package is not None:
            modules.append(".".join([package, *Path(path).with_suffix("").parts]))
    return modules


def test_every_module_is_in_the_map_once():
    files = [name for name, path in MODULES.items() if path.name != "__init__.py"]

    assert sorted(layout()) == sorted(files)


def imported_modules(module):
    """Modules of these packages that a module imports, in functions too; a folder's front stands for its modules."""
    for name in imports(MODULES[module].read_text()):
        target = name if name in MODULES else name.rpartition(".")[0]
        if target in PACKAGES or target not in MODULES:
            continue
        if MODULES[target].name == "__init__.py":
            yield from (other for other in MODULES if is_in(other, target) and other != target)
        else:
            yield target


@pytest.mark.parametrize("module", layout())
def test_a_module_imports_only_what_stands_below_it_in_the_map(module):
    order = layout()
    below = set(order[order.index(module) + 1 :])

    assert set(imported_modules(module)) <= below


def test_the_map_has_arrows_to_hold():
    assert "dq_kernels.ops" in imported_modules("dq_runtime.layers")
    assert "dq_kernels.triton.gemm" in imported_modules("dq_kernels.ops")


BACKENDS = ("dq_kernels.triton", "dq_kernels.cpu", "dq_kernels.fake", "dq_kernels.reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_do_not_import_one_another(backend):
    others = [other for other in BACKENDS if other != backend]
    for module in (name for name in MODULES if is_in(name, backend)):
        found = imports(MODULES[module].read_text())
        assert not [name for name in found if any(is_in(name, other) for other in others)], module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution of a copy, so that the repository's build folder stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for root in PACKAGES.values():
        shutil.copytree(root, source / root.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), "source"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_two_packages_and_none_is_called_kernels(wheel):
    top_level = {name.partition("/")[0] for name in wheel.namelist()}

    assert top_level == {"dq_kernels", "dq_runtime", f"dq_runtime-{dq_runtime.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {
        f"{package}/{path.relative_to(root).as_posix()}"
        for package, root in PACKAGES.items()
        for path in [
            *root.rglob("*.py"),
            *root.glob("triton/tuning/*.json"),
            *root.glob("cpu/*.cpp"),
            root / "py.typed",
        ]
    }

    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_installs_the_command(wheel):
    entry_points = wheel.read(f"dq_runtime-{dq_runtime.__version__}.dist-info/entry_points.txt").decode()
    module, _, attribute = re.search(r"^dq-runtime = (.*)$", entry_points, re.MULTILINE)[1].partition(":")

    assert entry_points.startswith("[console_scripts]")
    assert callable(getattr(importlib.import_module(module), attribute))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True).stdout


def test_importing_the_package_imports_itself_alone():
    code = "import sys; before = set(sys.modules); import dq_runtime; print(*set(sys.modules) - before)"
    imported = {name.partition(".")[0] for name in run_python(code).split()}

    assert imported <= {"dq_runtime", *sys.stdlib_module_names}
    assert {name for name in run_python(code).split() if "." in name and name.startswith("dq_runtime")} == {
        "dq_runtime.diffusers_registration"
    }


def test_the_method_is_registered_even_by_the_module_that_imports_diffusers():
    code = """import dq_runtime.config, sys
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, DiffusersAutoQuantizer
print(AUTO_QUANTIZATION_CONFIG_MAPPING["dilatequant"].__name__)
print("dq_runtime.diffusers_quantizer" in sys.modules)
print(type(DiffusersAutoQuantizer.from_config({"quant_method": "dilatequant"}, pre_quantized=True)).__name__)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(AUTO_QUANTIZATION_CONFIG_MAPPING["dilatequant"].__name__)
"""

    assert run_python(code).split() == ["DilateQuantConfig", "False", "DilateQuantizer", "DilateQuantConfig"]


def test_every_public_name_is_found_on_first_use_and_listed():
    assert all(getattr(dq_runtime, name) is not None for name in dq_runtime.__all__)
    assert sorted(dq_runtime._MODULES) == sorted(dq_runtime.__all__)
    assert set(dq_runtime.__all__) <= set(dir(dq_runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dq_runtime.nothing  # noqa: B018


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "fcntl"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from diffusers import UNet2DModel
import dq_runtime
from dq_kernels import self_check, triton
unet = UNet2DModel(
    sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    layers_per_block=1,
)
with dq_runtime.record(unet) as calls:
    unet(torch.randn(1, 3, 8, 8), 10)
dq_runtime.calibrate(unet, calls, dq_runtime.DilateQuantConfig(dilation="none"), None)
dq_runtime.fuse(unet)
sample = torch.randn(1, 3, 8, 8)
unet.save_pretrained(sys.argv[1])
loaded = UNet2DModel.from_pretrained(sys.argv[1])
calls.save(sys.argv[1] + "/calls.safetensors")
torch.testing.assert_close(loaded(sample, 10).sample, unet(sample, 10).sample)
try:
    triton.quantize(sample)
except ImportError as error:
    print(error)
assert all(check.passed for check in self_check.check_operators(torch.device("cpu")))
print(self_check.kernels_in_use(torch.device("cpu"))["backend"])
"""


def test_without_triton_and_file_locks_models_run_on_the_cpu(tmp_path):
    """As on macOS and Windows."""
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    assert run.returncode == 0, run.stderr
    assert "quantize needs Triton on a GPU" in run.stdout
    assert "pip install triton" in run.stdout


def test_the_wheels_files_are_the_repositorys(wheel):
    for package, root in PACKAGES.items():
        name = f"{package}/__init__.py"
        assert wheel.read(name) == (root / "__init__.py").read_bytes()


def test_the_source_distribution_has_the_documents_of_a_release(wheel):
    (path,) = Path(wheel.filename).parent.glob("*.tar.gz")
    with tarfile.open(path) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}

    assert {"setup.py", "README.md", "CHANGELOG.md", "LICENSE", "kernels/ops.py", "dq_runtime/__init__.py"} <= names


def test_the_wheels_metadata(wheel):
    metadata = wheel.read(f"dq_runtime-{dq_runtime.__version__}.dist-info/METADATA").decode()
    requirements = set(re.findall(r"^Requires-Dist: ([\w-]+)(?![^\n]*extra ==)", metadata, re.MULTILINE))

    assert "\nName: dq-runtime\n" in metadata
    assert f"\nVersion: {dq_runtime.__version__}\n" in metadata
    assert {"torch", "triton", "diffusers"} <= requirements
    assert "torchvision" not in metadata
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_install(wheel):
    metadata = wheel.read(f"dq_runtime-{dq_runtime.__version__}.dist-info/METADATA").decode()
    required = re.sub(r'; sys_platform == "linux"$', "", metadata, flags=re.MULTILINE)
    admitted = dict(re.findall(r"^Requires-Dist: ([\w-]+)>=([\d.]+)$", required, re.MULTILINE))
    pins = (REPOSITORY / "constraints-oldest.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", pins, re.MULTILINE))

    assert tested == {name: f"{version}.0" for name, version in admitted.items()}


def test_every_third_party_import_is_a_requirement(wheel):
    """Of the installed packages; an extra counts only for dq_runtime.evaluation."""
    metadata = wheel.read(f"dq_runtime-{dq_runtime.__version__}.dist-info/METADATA").decode()
    distributions = {"skimage": "scikit-image", "PIL": "pillow"}
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)(?![^\n]*extra ==)", metadata, re.MULTILINE))
    evaluation = set(re.findall(r"^Requires-Dist: ([\w-]+)[^\n]*extra == [\"']evaluation", metadata, re.MULTILINE))
    known = {*sys.stdlib_module_names, *PACKAGES}

    assert "scikit-image" in evaluation
    for module, path in MODULES.items():
        used = {name.partition(".")[0] for name in imports(path.read_text())} - known
        available = required | evaluation if is_in(module, "dq_runtime.evaluation") else required
        assert {distributions.get(name, name) for name in used} <= available, module
