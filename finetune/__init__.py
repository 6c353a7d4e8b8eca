"""finetune: one recipe trains, resumes, judges, merges and proves a LoRA/QLoRA derivative of Qwen-14B."""

__version__ = "0.1.0"
