"""What a trial of a training run needs, imported once by the warm server: a trial then takes about a second."""

import accelerate
import bitsandbytes
import peft
import torch
import transformers.integrations.bitsandbytes
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2
import transformers.quantizers.quantizer_bnb_4bit
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import finetune.cli
import finetune.pipeline

get_checkpoint_conversion_mapping("qwen2")  # a table of every architecture, built at the first call and kept

__all__ = ["accelerate", "bitsandbytes", "finetune", "peft", "torch", "transformers"]
