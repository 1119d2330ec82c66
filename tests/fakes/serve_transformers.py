"""Starts `transformers serve` where accelerate is not installed, which it wants only to put weights on a device."""

import sys
from typing import Any

from transformers.cli.transformers import main
from transformers.modeling_utils import PreTrainedModel

_load = PreTrainedModel.from_pretrained.__func__


def load(cls: Any, /, *arguments: Any, device_map: Any = None, **settings: Any) -> Any:
    """`from_pretrained` on the CPU, where weights lie anyway."""
    return _load(cls, *arguments, **settings)


if __name__ == "__main__":
    PreTrainedModel.from_pretrained = classmethod(load)
    sys.argv[0] = "transformers"
    main()
