"""One checkpoint has one fingerprint, whatever is done to its model, and in diffusers' layout as in ComfyUI's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dode_nodes.tables.fingerprint import fingerprint, same_checkpoint
from tests.hosts.comfy.cases.subjects import stock_node
from tests.hosts.comfy.tiny_networks import FLUX, MMDIT, UNET, in_diffusers_layout, real

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("comfyui")]

SDXL = UNET | {"num_classes": "sequential", "adm_in_channels": 48, "use_linear_in_transformer": True}
NETWORKS = {"SD15": UNET, "SDXL": SDXL, "Flux": FLUX, "SD3": MMDIT}
FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def make(family, seed=0):
    import comfy.ldm.flux.model
    import comfy.supported_models

    settings = NETWORKS[family]
    if family == "Flux" and "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        settings = settings | {"txt_ids_dims": []}  # newer hosts ask for it
    return real(getattr(comfy.supported_models, family), settings, seed)


def of(model):
    """The fingerprint that a table of the model keeps."""
    from dode_nodes.hosts.comfy.model_facts import model_facts

    return model_facts(model)["fingerprint"]


def plain(model):
    """The network's weights, by the names that they have in a file of it alone."""
    prefix = "diffusion_model."
    return {
        name.removeprefix(prefix): each for name, each in model.model_state_dict(filter_prefix=prefix).items()
    }


# --- layouts


@pytest.mark.parametrize("family", NETWORKS)
def test_the_layout_of_diffusers_is_what_comfyui_reads(family):
    """Else the next tests prove nothing: ComfyUI's converter makes the same weights of it."""
    import comfy.model_detection
    import comfy.utils

    weights = plain(make(family))
    theirs = in_diffusers_layout(weights, NETWORKS[family])
    if family in ("SD15", "SDXL"):
        names = comfy.utils.unet_to_diffusers(NETWORKS[family])
        back = {names[name]: weight for name, weight in theirs.items()}
    else:
        back = comfy.model_detection.convert_diffusers_mmdit(dict(theirs), "")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back)
    assert len(theirs.keys() & weights.keys()) <= 2  # context_embedder is one of the same name


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("family", NETWORKS)
def test_a_checkpoint_is_recognised_in_diffusers_layout(family, dtype):
    model = make(family)
    theirs = in_diffusers_layout(plain(model), NETWORKS[family])
    other = fingerprint(weight.to(dtype) for weight in theirs.values())
    assert same_checkpoint(of(model), other) is same_checkpoint(other, of(model)) is True
    assert same_checkpoint(of(make(family, seed=1)), other) is False


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("family", NETWORKS)
def test_weights_moved_by_one_percent_are_another_checkpoint_in_diffusers_layout(family, dtype):
    model = make(family)
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: weight * (1 + 0.01 * torch.randn(weight.shape, generator=generator))
        for name, weight in in_diffusers_layout(plain(model), NETWORKS[family]).items()
    }
    assert same_checkpoint(of(model), fingerprint(weight.to(dtype) for weight in moved.values())) is False


@pytest.mark.parametrize("family", ["Flux", "SD3"])
def test_joined_q_k_and_v_are_split_there(family):
    """What makes the layouts different; the names alone would be too easy."""
    weights = plain(make(family))
    theirs = in_diffusers_layout(weights, NETWORKS[family])
    shapes, their_shapes = (Counter(tuple(each.shape) for each in w.values()) for w in (weights, theirs))
    assert sum(their_shapes.values()) > sum(shapes.values())
    assert shapes != their_shapes


# --- what people put on a model


def compiled_by_the_core_node(model):
    return stock_node("nodes_torch_compile", "TorchCompileModel", model=model, backend="inductor")


def compiled_network(model):
    """As an object patch of KJNodes, while it is applied."""
    patched = model.clone()
    patched.model.diffusion_model = torch.compile(model.model.diffusion_model)
    assert any("_orig_mod" in name for name in plain(patched))
    return patched


def compiled_blocks(model):
    patched = model.clone()
    network = patched.model.diffusion_model
    network.middle_block = torch.compile(network.middle_block)
    patched.add_object_patch("diffusion_model.out", torch.compile(network.out))
    patched.patch_model(torch.device("cpu"))
    assert any("_orig_mod" in name for name in plain(patched))
    return patched


def other_sampling(model):
    return stock_node(
        "nodes_model_advanced", "ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False
    )


class Around(torch.nn.Module):
    """A block in a block, as packs put them."""

    def __init__(self, block):
        super().__init__()
        self.inside = block
        self.scale = torch.nn.Parameter(torch.randn(32))


def block_in_a_block(model):
    patched = model.clone()
    patched.add_object_patch("diffusion_model.out", Around(model.model.diffusion_model.out))
    patched.patch_model(torch.device("cpu"))
    return patched


def lora(model, apply):
    patched = model.clone()
    large = [name for name, each in model.model_state_dict().items() if each.ndim == 2]
    patched.add_patches({name: (torch.randn_like(model.model_state_dict()[name]),) for name in large}, 0.8)
    if apply:
        before = {name: model.model_state_dict()[name].clone() for name in large}
        patched.patch_model(torch.device("cpu"))
        assert all(not torch.equal(before[name], patched.model_state_dict()[name]) for name in large)
    return patched


def lora_to_come(model):
    return lora(model, apply=False)


def lora_applied(model):
    return lora(model, apply=True)


def another_memory_format(model):
    model.model.diffusion_model.to(memory_format=torch.channels_last)
    return model


def unknown_classes(model):
    """Some weights of a class of their own, and without values."""
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "attn" in name:
            module.weight = torch.nn.Parameter(module.weight.data.to("meta"), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "change",
    [
        compiled_by_the_core_node,
        compiled_network,
        compiled_blocks,
        other_sampling,
        block_in_a_block,
        lora_to_come,
        lora_applied,
        another_memory_format,
        unknown_classes,
    ],
)
def test_what_is_put_on_a_model_does_not_make_it_another(change):
    with torch.inference_mode(False):
        original = of(make("SD15"))
        changed = change(make("SD15"))
        assert same_checkpoint(of(changed), original) is True
        assert same_checkpoint(of(change(make("SD15", seed=1))), original) is False


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_weights_are_left_out(name):
    """A file in scaled fp8 holds other numbers; the rest of it is compared."""
    with torch.inference_mode(False):
        original, model = of(make("Flux")), make("Flux")
        for module in model.model.diffusion_model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().max() / 448
                setattr(module, name, torch.nn.Parameter(scale, requires_grad=False))
                scaled = (module.weight / scale).to(torch.float8_e4m3fn)
                module.weight = torch.nn.Parameter(scaled, requires_grad=False)
        assert 0 < len(of(model)["samples"]) < len(original["samples"])
        assert same_checkpoint(of(model), original) is True
        assert same_checkpoint(of(model), of(make("Flux", seed=1))) is False


def test_a_model_that_cannot_be_looked_at_has_no_fingerprint(caplog):
    model = make("SD15")

    def no_state_dict(*args, **kwargs):
        raise RuntimeError("no state dict today")

    model.model.state_dict = no_state_dict
    assert of(model) == {}
    assert "the weights of this model cannot be read: no state dict today" in caplog.text
