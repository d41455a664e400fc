"""The documents: their code runs, their commands parse, their links lead somewhere, their error messages exist."""

import ast
import contextlib
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_pipeline
import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import dq_runtime
from dq_runtime.cli.app import app

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *PAGES]
NARROW = {"block_out_channels": (16, 32), "norm_num_groups": 4}
# What a machine without a GPU, and little time, runs instead.
REPLACEMENTS = {
    '"cuda"': '"cpu"',
    "torch.float16": "torch.float32",
    "512, 512": "16, 16",
    "4, 64, 64": "4, 8, 8",
    "from_unet(stock.unet)": "from_unet(stock.unet, conditioning_embedding_out_channels=(16, 32))",
    "num_inference_steps=25": "num_inference_steps=2",
    '"num_inference_steps": 25': '"num_inference_steps": 2',
    '{"prompt": p}': '{"prompt": p, "num_inference_steps": 2}',
    'pipe("a lighthouse at dusk").images': 'pipe("a lighthouse at dusk", num_inference_steps=2).images',
    "Distillation(folder=": "Distillation(samples=2, batch_size=2, iterations=1, folder=",
}


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def with_code(documents):
    return [pytest.param(document, id=document.name) for document in documents if blocks(document, "python")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that the documents name: a pipeline, the same one packed, its packed UNet, and a LoRA."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "path" / "or").mkdir(parents=True)
    tiny_pipeline.save_pipeline(folder, **NARROW).rename(folder / "path" / "or" / "repo")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "path" / "or" / "repo")
    pipeline.set_progress_bar_config(disable=True)
    calls = dq_runtime.collect_from_pipeline(pipeline, [{"prompt": "a", "num_inference_steps": 2}])
    dq_runtime.calibrate(pipeline.unet, calls, dq_runtime.DilateQuantConfig(dilation="none"), None)
    pipeline.save_pretrained(folder / "packed")
    shutil.copytree(folder / "packed" / "unet", folder / "unet-w4a8")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(folder, layers, weight_name="lora.safetensors")
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """A working folder with copies of them."""
    shutil.copytree(files, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def graphs_wanted(monkeypatch):
    """Graphs need a GPU: the calls are counted."""
    wanted = []
    monkeypatch.setitem(vars(dq_runtime), "enable_cuda_graphs", wanted.append)
    return wanted


@pytest.mark.parametrize("document", with_code(DOCUMENTS))
def test_the_code_of_a_document_runs_from_top_to_bottom(document, place, graphs_wanted, capsys):
    names = {}
    for code in blocks(document, "python"):
        for found, instead in REPLACEMENTS.items():
            code = code.replace(found, instead)
        exec(compile(code, document.name, "exec"), names)

    assert all(isinstance(unet, UNet2DConditionModel) for unet in graphs_wanted)
    assert len(graphs_wanted) == "".join(blocks(document, "python")).count("enable_cuda_graphs(")


def test_the_reader_of_the_format_gives_the_packed_weights(place):
    names = {}
    exec(blocks(DOCS / "format.md", "python")[0], names)
    unet = UNet2DConditionModel.from_pretrained("unet-w4a8")

    layers = dq_runtime.layers.quantized_layers(unet)
    assert names["weights"].keys() == layers.keys()
    for name, layer in layers.items():
        ours, theirs = layer.weight, torch.tensor(names["weights"][name]).movedim(-1, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def commands():
    lines = {
        line.partition(" #")[0].strip()
        for document in DOCUMENTS
        for block in blocks(document, "(?:bash)?")
        for line in block.splitlines()
        if line.startswith("dq-runtime ")
    }
    return sorted(lines)


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_documents_have_these_options(line):
    _, command, *arguments = shlex.split(line)
    group = typer.main.get_command(app)

    with contextlib.closing(group.commands[command].make_context(command, arguments)) as context:
        assert context.params


def test_the_documents_show_every_command():
    shown = {line.split()[1] for line in commands()}

    assert shown == set(typer.main.get_command(app).commands)


def anchors(document):
    """The anchors of a document's headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [pytest.param(document, id=document.name) for document in DOCUMENTS])
def test_links_lead_somewhere(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        file = document if not target else document.parent / target
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)

    assert broken == []


def test_every_page_is_in_the_sites_navigation():
    in_navigation = re.findall(r"^  - ([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)

    assert sorted(in_navigation) == [page.name for page in PAGES]


def test_the_reference_lists_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert getattr(importlib.import_module(module), attribute).__doc__, name

    assert {f"dq_runtime.{name}" for name in dq_runtime.__all__} <= set(listed)


def texts(folder):
    """All texts in the code of a folder; the values in a formatted one are left out."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


OTHERS = ("Unknown quantization type, got ",)  # diffusers' own
NO_MESSAGES = {"The image is black, or noise", "It is slower than fp16"}


def test_the_messages_that_are_explained_exist():
    known = [*texts(REPOSITORY / "dq_runtime"), *texts(REPOSITORY / "kernels"), *OTHERS]
    titles = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [title for title in titles if title not in NO_MESSAGES]

    assert len(messages) > 15
    for message in messages:
        fragments = [
            fragment.strip() for fragment in message.replace("dilatequant", "…").split("…") if fragment.strip()
        ]
        assert any(all(fragment in text for fragment in fragments) for text in known), message
