"""Which layers have an attention window, and which have rotary positions, by the keys of a ``config.json``."""

from __future__ import annotations

from .config_reader import ConfigReader
from .family_table import FAMILIES, Family
from .rope_settings import FULL, WINDOWED

Windows = tuple[int | None, ...]


def sliding_windows(reader: ConfigReader, model_type: str, num_layers: int) -> Windows:
    """Return the window of each layer, see :data:`.family_table.WindowPattern`.

    Args:
        reader: of the config with the family's defaults.
        model_type: its family.
        num_layers: number of layers.

    Raises:
        UserError: keys contradict each other or have no effect.
    """
    family, config, kinds = FAMILIES[model_type], reader.config, _layer_types(reader, num_layers)
    wanted, window = reader.flag("use_sliding_window"), None
    if config.get("sliding_window") is not None:
        window = reader.integer("sliding_window", least=0)
    if family.windows == "none":
        windows = _none(reader, model_type, window, num_layers)
    elif family.windows == "all":
        windows = _all(reader, model_type, window, num_layers)
    elif family.windows == "from_layer":
        windows = _from_layer(reader, window, kinds, num_layers)
    elif family.windows == "periodic":
        windows = _periodic(reader, family, window, kinds, num_layers)
    elif not wanted:
        windows = (None,) * num_layers
    elif kinds is not None:
        windows = tuple(window if kind == WINDOWED else None for kind in kinds)
    elif family.windows == "qwen":
        windows = _from_layer(reader, window, None, num_layers)
    else:
        windows = tuple(None if rotates else window for rotates in _rotary_flags(reader, family, num_layers))
    if any(size is not None for size in windows):
        reader.integer("sliding_window")  # if used, 0 would hide everything
    if kinds is not None and [kind == WINDOWED for kind in kinds] != [bool(window) for window in windows]:
        has = f"sliding_window {config.get('sliding_window')} and use_sliding_window {str(wanted).lower()}"
        remedy = f"with model_type {model_type}, {has}, other layers have windows; correct or remove layer_types"
        reader.fail("layer_types", kinds, remedy)
    return windows


def _none(reader: ConfigReader, model_type: str, window: int | None, num_layers: int) -> Windows:
    wanted, config = reader.flag("use_sliding_window"), reader.config
    if wanted or (window is not None and config.get("use_sliding_window") is None):
        key = "use_sliding_window" if wanted else "sliding_window"
        name = model_type.capitalize()
        reader.fail(key, config[key], f"{name} models have no sliding windows; remove it, or set model_type: mistral")
    return (None,) * num_layers


def _all(reader: ConfigReader, model_type: str, window: int | None, num_layers: int) -> Windows:
    """Return windows in all layers, such as Mistral's."""
    name = model_type.capitalize()
    if window is not None and reader.config.get("use_sliding_window") is False:
        remedy = f"{name} models have their sliding_window ({window}) in all layers; set sliding_window to null"
        reader.fail("use_sliding_window", False, remedy)
    if window is not None and reader.config.get("max_window_layers"):
        first = reader.integer("max_window_layers", least=0)
        reader.fail("max_window_layers", first, f"{name} models have their window in all layers; remove it")
    return (window,) * num_layers


def _from_layer(reader: ConfigReader, window: int | None, kinds: list[str] | None, num_layers: int) -> Windows:
    """Return windows in the layers that ``layer_types`` names, by default in those from ``max_window_layers`` on."""
    first = reader.integer("max_window_layers", default=28, least=0)
    kinds = kinds or [WINDOWED if layer >= first else FULL for layer in range(num_layers)]
    return tuple(window if kind == WINDOWED else None for kind in kinds)


def _periodic(
    reader: ConfigReader, family: Family, window: int | None, kinds: list[str] | None, num_layers: int
) -> Windows:
    """Return windows according to ``layer_types``, by default in all but every n-th layer."""
    period = family.full_attention_every
    if "sliding_window_pattern" in family.read_keys:
        period = reader.integer("sliding_window_pattern", default=period)
    kinds = kinds or [FULL if layer % period == 0 else WINDOWED for layer in range(1, num_layers + 1)]
    if WINDOWED in kinds:
        window = reader.integer("sliding_window")
    return tuple(window if kind == WINDOWED else None for kind in kinds)


def _layer_types(reader: ConfigReader, num_layers: int) -> list[str] | None:
    kinds = reader.config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        reader.fail("layer_types", kinds, f"it must name num_hidden_layers = {num_layers} layers")
    for kind in kinds:
        if kind not in (FULL, WINDOWED):
            reader.not_native("layer_types", kind, f"supported: {FULL}, {WINDOWED}")
    return kinds


def rotary_layers(reader: ConfigReader, family: Family, windows: Windows) -> list[bool]:
    """Return for each layer whether it has rotary positions, see :data:`.family_table.RopePattern`.

    Args:
        reader: of the config with the family's defaults.
        family: its family.
        windows: of the layers.
    """
    if family.rope == "windowed":
        return [window is not None for window in windows]
    if family.rope == "no_rope_layers":
        return _rotary_flags(reader, family, len(windows))
    return [True] * len(windows)


def _rotary_flags(reader: ConfigReader, family: Family, num_layers: int) -> list[bool]:
    """Return ``no_rope_layers``, which has a 1 for layers *with* rotary positions."""
    flags = reader.config.get("no_rope_layers")
    if flags is None:
        period = reader.integer("no_rope_layer_interval", default=4)
        return [layer % period != 0 for layer in range(1, num_layers + 1)]
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        reader.fail("no_rope_layers", flags, f"a list of num_hidden_layers = {num_layers} zeros and ones is needed")
    return [bool(flag) for flag in flags[:num_layers]]
