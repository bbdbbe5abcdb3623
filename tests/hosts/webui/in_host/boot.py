"""A WebUI without its server, in this process: started as its launch.py does, with the pack as its only extension."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.webui_hosts import arguments


def boot(checkout: Path, data: Path) -> None:
    """Import the host and load its scripts.

    Args:
        data: its data folder: models/Stable-diffusion, extensions, config.json.
    """
    sys.argv = ["webui.py", *arguments(checkout), "--data-dir", str(data)]
    sys.path.insert(0, str(checkout))
    os.chdir(checkout)
    if (checkout / "modules_forge").is_dir():
        from modules_forge.initialization import initialize_forge

        initialize_forge()
    from modules import initialize

    initialize.imports()
    from modules import extensions, scripts, sd_models

    extensions.list_extensions()
    scripts.load_scripts()
    sd_models.setup_model()
    sd_models.list_models()


def load_checkpoint(name: str) -> Any:
    """The model, as the host loads it."""
    from modules import sd_models, shared

    info = next(each for each in sd_models.checkpoints_list.values() if each.name_for_extra == name)
    shared.opts.set("sd_model_checkpoint", info.title)
    if hasattr(sd_models, "forge_model_reload"):
        from modules_forge import main_entry

        main_entry.refresh_model_loading_parameters()
        sd_models.forge_model_reload()
    else:
        from modules import sd_hijack

        if hasattr(sd_hijack, "list_optimizers"):
            sd_hijack.list_optimizers()
        sd_models.load_model(info)
    return shared.sd_model


def wrapper_of(model: Any) -> Any:
    """What holds the network, as ``diffusion_model``."""
    objects = getattr(model, "forge_objects", None)
    return model.model if objects is None else objects.unet.model


def text_encoder_of(model: Any) -> Any:
    """What has the layers of CLIP."""
    objects = getattr(model, "forge_objects", None)
    return model.cond_stage_model if objects is None else objects.clip.cond_stage_model


def module_of(name: str) -> ModuleType:
    """The script that the host has loaded from the pack."""
    from modules import scripts

    return next(data.module for data in scripts.scripts_data if data.path.endswith(name))
