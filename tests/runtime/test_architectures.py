"""Models other than UNets: calibration, loading, sampling and fusion follow each description."""

import copy
import functools
from dataclasses import replace

import distilling
import pytest
import tiny_models
import tiny_unets
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

import dq_runtime
from dq_runtime import DilateQuantConfig, Distillation, QuantLinear
from dq_runtime.architectures import supported
from dq_runtime.architectures.supported import ARCHITECTURES, architecture_of
from dq_runtime.architectures.unets import UNET2D
from dq_runtime.calibration.batches import MixedBatches
from dq_runtime.calibration.collect import CalibrationSet
from dq_runtime.calibration.replay import blocks_in_order, squared_error
from dq_runtime.convert import plan_conversion
from dq_runtime.fused import fuse, is_fused
from dq_runtime.layers import quantized_layers

BATCH = 6
SHORT = {"samples": 18, "batch_size": 6, "iterations": 3}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_controlnet(model, timestep=500, seed=0):
    return model(normal(BATCH, 4, 8, 8, seed=seed), timestep, **tiny_models.controlnet_arguments(BATCH, seed))


def call_flux(model, timestep=0.5, seed=0):
    arguments = tiny_models.flux_arguments(BATCH, seed)
    sample = normal(BATCH, tiny_models.TOKENS, 16, seed=seed)
    return model(hidden_states=sample, timestep=torch.full((BATCH,), timestep), **arguments)


def decode(model, timestep=None, seed=0):
    return model.decode(normal(BATCH, 4, 8, 8, seed=seed))


KINDS = {
    "controlnet": (tiny_models.controlnet, call_controlnet, (100, 900)),
    "decoder": (tiny_models.autoencoder, decode, (None, None)),
    "flux": (tiny_models.flux, call_flux, (0.25, 1.0)),
}


class Subject:
    """A model of one kind, the record of two calls, and the quantized model."""

    def __init__(self, kind):
        new, self.call, timesteps = KINDS[kind]
        self.kind, self.stock = kind, new()
        with torch.no_grad(), dq_runtime.record(self.stock) as self.calibration_set:
            for seed, timestep in enumerate(timesteps):
                self.call(self.stock, timestep, seed)
        self.quantized = self.calibrated()

    def calibrated(self, distillation=None, **config):
        config = DilateQuantConfig(**{"dilation": "weight"} | config)
        with torch.no_grad():
            return dq_runtime.calibrate(copy.deepcopy(self.stock), self.calibration_set, config, distillation)

    def result(self, model, seed=0):
        """All that a call returns, as one tensor."""
        return architecture_of(model).result(self.call(model, KINDS[self.kind][2][0], seed))

    def error(self, model):
        """The relative squared error on what was recorded."""
        result, calls = architecture_of(model).result, self.calibration_set.calls
        pairs = [(result(call.run(model)), result(call.run(self.stock))) for call in calls]
        return float(sum((y - x).square().sum() for y, x in pairs) / sum(x.square().sum() for _, x in pairs))


subject_of = functools.cache(Subject)


@pytest.fixture(params=KINDS)
def subject(request):
    return subject_of(request.param)


@pytest.mark.supports(
    "Models",
    "`UNet2DModel`, `UNet2DConditionModel`, `ControlNetModel`, `AutoencoderKL`, `FluxTransformer2DModel`",
    "quantized, near the original",
    "of an autoencoder the decoder; Flux has no fused blocks",
)
def test_a_quantized_model_stays_near_the_original(subject):
    # Four bits of random weights cost 0.02 here at most. Broken wiring would cost 1.
    assert 0 < subject.error(subject.quantized) < 0.05


def test_joint_dilation_judges_by_all_that_the_model_returns():
    subject = subject_of("controlnet")

    assert 0 < subject.error(subject.calibrated(dilation="joint")) < 0.05


def test_timesteps_are_looked_up_in_a_table_of_learned_embeddings():
    unet = tiny_unets.unet2d(time_embedding_type="learned", num_train_timesteps=1000)
    with torch.no_grad(), dq_runtime.record(unet) as calibration_set:
        expected = [unet(normal(2, 3, 8, 8), timestep).sample for timestep in (1, torch.tensor([999, 1]))]

    for call, output in zip(calibration_set.calls, expected, strict=True):
        assert torch.equal(call.run(unet).sample, output)
    fuse(dq_runtime.calibrate(unet, calibration_set, DilateQuantConfig(dilation="none"), distillation=None))
    for call, output in zip(calibration_set.calls, expected, strict=True):
        assert 0 < squared_error(call.run(unet).sample, output).mean() < 0.05 * output.square().mean()


def test_a_short_distillation_helps(subject):
    distilled = subject.calibrated(Distillation(**SHORT, polish_iterations=2))

    assert 0 < subject.error(distilled) < 0.8 * subject.error(subject.quantized)


def test_saved_and_loaded_by_stock_from_pretrained(subject, tmp_path, assert_same_tensors):
    subject.quantized.save_pretrained(tmp_path)

    loaded = type(subject.stock).from_pretrained(tmp_path)

    assert quantized_layers(loaded).keys() == quantized_layers(subject.quantized).keys()
    assert_same_tensors(loaded.state_dict(), subject.quantized.state_dict())
    assert torch.equal(subject.result(loaded), subject.result(subject.quantized))


def test_the_way_back_leaves_nothing_behind(subject):
    model = copy.deepcopy(subject.quantized)
    fuse(model)

    model.dequantize()

    assert vars(model).keys() == vars(subject.stock).keys()
    for (name, module), stock in zip(model.named_modules(), subject.stock.modules(), strict=True):
        assert type(module) is type(stock), name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert not module._forward_hooks_always_called, name
    assert 0 < subject.error(model) < 0.05


@pytest.mark.supports("Models", "fused blocks", "in UNets, ControlNets and the decoder of an autoencoder")
@pytest.mark.parametrize("kind", ["controlnet", "decoder"])
def test_blocks_of_unets_are_fused_wherever_they_are(kind, monkeypatch):
    subject = subject_of(kind)
    model = copy.deepcopy(subject.quantized)

    fused = fuse(model)

    blocks = {"ResnetBlock2D", "Upsample2D"} if kind == "decoder" else {"ResnetBlock2D", "BasicTransformerBlock"}
    assert blocks <= set(fused.values())
    expected = subject.result(subject.quantized)
    stock_forward = ResnetBlock2D.forward

    def forward(block, *args, **kwargs):
        assert type(block) is ResnetBlock2D, "a fused block has stepped aside"
        return stock_forward(block, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    result = subject.result(model)
    assert (result - expected).norm() < 0.03 * expected.norm()


def test_a_model_without_fused_blocks_stays_as_it_is():
    subject = subject_of("flux")
    model = copy.deepcopy(subject.quantized)

    assert fuse(model) == {}

    assert not is_fused(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert torch.equal(subject.result(model), subject.result(subject.quantized))


# The descriptions


def test_of_an_autoencoder_the_decoder_is_quantized():
    subject = subject_of("decoder")
    image = normal(2, 3, 16, 16)

    names = list(quantized_layers(subject.quantized))
    assert names
    assert all(name.startswith("decoder.") for name in names)
    assert not {"decoder.conv_in", "decoder.conv_out"} & set(names)
    assert subject.quantized.config.quantization_config.timesteps == [0.0]
    for model in (subject.quantized, copy.deepcopy(subject.quantized).dequantize()):
        latents = model.encode(image).latent_dist.mean
        assert torch.equal(latents, subject.stock.encode(image).latent_dist.mean)


def test_however_an_autoencoder_decodes_its_decoder_knows_the_batch():
    vae = copy.deepcopy(subject_of("decoder").quantized)
    latents = normal(3, 4, 8, 8)
    whole = vae.decode(latents).sample

    vae.enable_slicing()
    assert (vae.decode(latents).sample - whole).norm() < 0.05 * whole.norm()
    assert torch.equal(
        vae(normal(1, 3, 16, 16)).sample, vae.decode(vae.encode(normal(1, 3, 16, 16)).latent_dist.mode()).sample
    )
    with pytest.raises(RuntimeError, match="no timestep is known"):
        vae.decoder.forward(latents)


def test_the_ends_of_a_transformer_stay_in_floating_point():
    model = subject_of("flux").quantized

    kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    embeddings = {f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text") for i in (1, 2)}
    assert kept == embeddings | {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}
    assert "single_transformer_blocks.0.proj_out" in quantized_layers(model)


def test_what_stays_in_floating_point_can_be_chosen():
    subject = subject_of("flux")

    model = subject.calibrated(modules_to_not_convert=["ff", "single_transformer_blocks"])

    assert isinstance(model.proj_out, QuantLinear)
    assert type(model.transformer_blocks[0].ff.net[2]) is nn.Linear
    assert model.config.quantization_config.modules_to_not_convert == ["ff", "single_transformer_blocks"]


def test_a_transformer_s_noise_level_selects_the_row():
    model = copy.deepcopy(subject_of("flux").quantized)
    rows = []
    model.x_embedder.register_forward_pre_hook(lambda *_: rows.append(model.timestep_grid.index.unique().tolist()))

    for level in (0.0, 0.6, 0.65, 1.0):
        call_flux(model, level)

    assert model.config.quantization_config.timesteps == [0.25, 1.0]
    assert rows == [[0], [0], [1], [1]]


@pytest.mark.parametrize("return_dict", [True, False])
def test_every_residual_of_a_controlnet_is_a_target(return_dict):
    subject = subject_of("controlnet")
    call = subject.calibration_set.calls[0]
    call = replace(call, arguments=call.arguments | {"return_dict": return_dict})
    down, mid = replace(call, arguments=call.arguments | {"return_dict": False}).run(subject.stock)

    result = architecture_of(subject.stock).result(call.run(subject.stock))

    assert torch.equal(result, torch.cat([residual.flatten(1) for residual in (*down, mid)], dim=1))
    elements = sum(residual[0].numel() for residual in (*down, mid))
    changed = architecture_of(subject.stock).result((down, mid + 1))
    expected = torch.full((BATCH,), mid[0].numel() / elements)
    torch.testing.assert_close(squared_error(changed, result), expected)


def test_both_streams_of_a_transformer_s_block_are_targets():
    architecture = architecture_of(subject_of("flux").stock)
    text, image = normal(2, 6, 4), normal(2, 16, 4)

    assert architecture.result((text, image)).shape == (2, (6 + 16) * 4)
    assert architecture.result(image) is image


EVERY_BLOCK = {
    "controlnet": ("controlnet_down_blocks.0", "controlnet_mid_block", "mid_block.attentions.0"),
    "decoder": ("decoder.mid_block.resnets.0", "decoder.mid_block.attentions.0", "decoder.up_blocks.0.upsamplers.0"),
    "flux": ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"),
}


def test_every_layer_is_in_a_block_and_blocks_come_in_forward_order(subject):
    config = DilateQuantConfig(modules_to_not_convert=list(architecture_of(subject.stock).modules_to_not_convert))
    layers = plan_conversion(subject.stock, config).layers

    blocks = blocks_in_order(subject.stock, layers.values(), subject.calibration_set.calls[0])

    order = [list(blocks).index(name) for name in EVERY_BLOCK[subject.kind]]
    if subject.kind != "controlnet":  # whose residuals leave it at the end
        assert order == sorted(order)
    for name, layer in layers.items():
        assert sum(layer in set(block.modules()) for block in blocks.values()) == 1, name
    if subject.kind == "flux":
        assert {type(block) for block in blocks.values()} == {FluxTransformerBlock, FluxSingleTransformerBlock}


def test_positions_are_everyone_s_even_where_they_are_as_many_as_samples():
    model = tiny_models.flux()
    with dq_runtime.record(model) as calibration_set:
        for level in (0.5, 1.0):
            arguments = tiny_models.flux_arguments(BATCH, text=BATCH)
            model(normal(BATCH, 16, 16), timestep=torch.full((BATCH,), level), **arguments)

    for batch in MixedBatches(calibration_set, samples=8, batch_size=4, seed=0):
        assert batch.arguments["txt_ids"].shape == (BATCH, 3)
        assert batch.arguments["img_ids"].shape == (16, 3)
        assert batch.arguments["pooled_projections"].shape == (len(batch.sample), 20)


# Where calls come from


def test_a_record_is_saved_and_read_with_what_its_samples_share(tmp_path):
    calibration_set = subject_of("flux").calibration_set
    calibration_set.save(tmp_path / "calls.pt")

    (call, _), loaded = calibration_set.calls, CalibrationSet.load(tmp_path / "calls.pt").calls[0]
    assert loaded.shared == call.shared == ("img_ids", "txt_ids")
    assert torch.equal(loaded.sample, call.sample)


def test_a_pickled_record_is_refused(tmp_path):
    calls = [(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), {})]
    torch.save({"calls": calls, "scheduler": None}, tmp_path / "calls.pt")

    with pytest.raises(ValueError, match=r"calls\.pt holds no calibration set: record it again"):
        CalibrationSet.load(tmp_path / "calls.pt")


@pytest.mark.supports("Pipelines", "ControlNet", "runs with a quantized UNet, ControlNet and decoder")
def test_a_controlnet_pipeline_of_quantized_components(relative_rms):
    stock = tiny_models.controlnet_pipeline(
        distilling.unet2d_condition(), subject_of("controlnet").stock, subject_of("decoder").stock
    )
    runs = [tiny_models.controlnet_run()]
    config = DilateQuantConfig(dilation="weight")
    expected = stock(**runs[0]).images

    unet_calls = dq_runtime.collect_from_pipeline(stock, runs)
    by_name = dq_runtime.collect_from_pipeline(stock, runs, component="controlnet")
    by_itself = dq_runtime.collect_from_pipeline(stock, runs, component=stock.vae)

    assert [call.sample.shape[0] for call in unet_calls.calls] == [4, 4, 4]  # with and without the prompt
    assert "down_block_additional_residuals" in unet_calls.calls[0].arguments
    assert by_name.timesteps == unet_calls.timesteps
    assert by_name.calls[0].arguments["controlnet_cond"].shape == (4, 3, 16, 16)
    assert by_name.scheduler is stock.scheduler
    assert [(call.sample.shape, call.timestep.tolist()) for call in by_itself.calls] == [((2, 4, 8, 8), [0.0])]

    quantized = tiny_models.controlnet_pipeline(
        dq_runtime.calibrate(copy.deepcopy(stock.unet), unet_calls, config, distillation=None),
        dq_runtime.calibrate(copy.deepcopy(stock.controlnet), by_name, config, distillation=None),
        dq_runtime.calibrate(copy.deepcopy(stock.vae), by_itself, config, distillation=None),
    )
    images = quantized(**runs[0]).images
    assert 0 < relative_rms(images, expected) < 0.1
    for model in (quantized.unet, quantized.controlnet, quantized.vae):
        fuse(model)
    assert relative_rms(quantized(**runs[0]).images, images) < 0.05


@pytest.mark.supports("Pipelines", "Flux", "runs with a quantized transformer")
def test_a_flux_pipeline_of_a_quantized_transformer(relative_rms):
    stock = tiny_models.flux_pipeline(tiny_models.flux())
    run = tiny_models.flux_run()
    expected = stock(**run).images

    calibration_set = dq_runtime.collect_from_pipeline(stock, [run])
    levels = stock.scheduler.sigmas[:-1].flip(0).tolist()
    assert calibration_set.timesteps == pytest.approx(levels)
    assert calibration_set.timesteps[-1] == 1

    quantized = tiny_models.flux_pipeline(
        dq_runtime.calibrate(copy.deepcopy(stock.transformer), calibration_set, distillation=None)
    )
    assert 0 < relative_rms(quantized(**run).images, expected) < 0.2


def test_sampling_with_a_bare_transformer_is_what_its_pipeline_does():
    model, run = tiny_models.flux(), tiny_models.flux_run()
    expected = dq_runtime.collect_from_pipeline(tiny_models.flux_pipeline(model), [run])
    ids = {name: expected.calls[0].arguments[name] for name in ("img_ids", "txt_ids")}
    arguments = {"encoder_hidden_states": run["prompt_embeds"], "pooled_projections": run["pooled_prompt_embeds"]}

    scheduler = FlowMatchEulerDiscreteScheduler()
    actual = dq_runtime.collect_from_scheduler(model, scheduler, run["latents"], 3, arguments | ids, batch_size=1)

    # The pipeline chooses its own three levels.
    assert actual.timesteps == pytest.approx((scheduler.timesteps / 1000).flip(0).tolist())
    assert [call.sample.shape[0] for call in actual.calls] == [1] * 6
    assert torch.equal(torch.cat([actual.calls[0].sample, actual.calls[3].sample]), run["latents"])
    velocity = actual.calls[0].run(model).sample
    step = float(scheduler.sigmas[0] - scheduler.sigmas[1])
    torch.testing.assert_close(actual.calls[1].sample, run["latents"][:1] - step * velocity)


@pytest.mark.parametrize("kind", ["controlnet", "decoder"])
def test_what_predicts_no_step_is_not_sampled_with(kind):
    model = subject_of(kind).stock

    with pytest.raises(TypeError, match=f"{type(model).__name__} does not predict.*component"):
        dq_runtime.collect_from_scheduler(model, FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 4, 8, 8), 2)


def test_a_component_that_is_not_there_is_refused_with_those_that_are():
    pipeline = tiny_models.flux_pipeline(subject_of("flux").stock)

    with pytest.raises(ValueError, match=r"FluxPipeline has no controlnet; .*\['vae', 'transformer'\]"):
        dq_runtime.collect_from_pipeline(pipeline, [], component="controlnet")
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler is no model that"):
        dq_runtime.collect_from_pipeline(pipeline, [], component="scheduler")


# Models without a description


class NoTimestep(UNet2DModel):
    def forward(self, sample):
        return super().forward(sample, 0)


class Own(nn.Module):
    """A transformer that diffusers does not have."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {}
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, noise_level, tokens):
        return tokens + torch.as_tensor(noise_level).reshape(-1, 1, 1) * self.block(tokens)


def use_calibrate(model):
    dq_runtime.calibrate(model, CalibrationSet(), distillation=None)


def use_record(model):
    with dq_runtime.record(model):
        pass


@pytest.mark.supports("Models", "other classes", "refused, with the classes that are known")
@pytest.mark.parametrize(
    "use", [use_calibrate, use_record, dq_runtime.enable_cuda_graphs], ids=["calibrate", "record", "graphs"]
)
def test_an_unknown_model_is_named_with_those_that_are_known(use):
    model = Own()
    model.device = torch.device("cuda")

    with pytest.raises(TypeError, match=r"^Own is no model .*UNet2DModel.*ControlNetModel.*AutoencoderKL.*Flux"):
        use(model)


@pytest.mark.supports("Models", "UNets without a timestep", "refused, with the arguments that they have")
@pytest.mark.parametrize("use", [use_calibrate, use_record])
def test_a_unet_without_a_timestep_is_told_so(use):
    torch.manual_seed(0)
    model = NoTimestep(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))

    with pytest.raises(TypeError, match=r"NoTimestep.forward has no argument 'timestep', found sample\."):
        use(model)


def test_a_description_is_all_that_a_new_model_needs(monkeypatch):
    own = replace(UNET2D, model_class="Own", blocks=("Sequential",), sample="tokens", timestep="noise_level")
    monkeypatch.setattr(supported, "ARCHITECTURES", (*ARCHITECTURES, own))
    model, tokens = Own(), normal(BATCH, 5, 8)
    with dq_runtime.record(model) as calibration_set:
        for level in (0.25, 1.0):
            model(level, tokens)
    expected = model(0.25, tokens)

    layers = plan_conversion(model, DilateQuantConfig()).layers
    assert list(blocks_in_order(model, layers.values(), calibration_set.calls[0])) == ["block"]
    model.register_to_config = lambda **config: None
    dq_runtime.calibrate(model, calibration_set, DilateQuantConfig(dilation="weight"), Distillation(**SHORT))

    assert calibration_set.timesteps == [0.25, 1.0]
    assert isinstance(model.block[0], QuantLinear)
    assert 0 < (model(0.25, tokens) - expected).norm() < 0.05 * expected.norm()


def test_subclasses_are_what_they_inherit_from():
    class Mine(UNet2DModel):
        pass

    assert architecture_of(Mine.__new__(Mine)) is UNET2D
    assert not supported.is_supported(Decoder())
    assert not supported.is_supported("unet")
