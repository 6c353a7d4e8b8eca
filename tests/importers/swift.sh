#!/bin/bash
# as somebody wrote it for ms-swift, on two cards
MODEL=base          # a folder
export CUDA_VISIBLE_DEVICES=0,1

NPROC_PER_NODE=2 \
swift sft \
    --model $MODEL \
    --train_type lora \
    --dataset 'train.jsonl#500' \
    --split_dataset_ratio 0.2 \
    --torch_dtype bfloat16 \
    --num_train_epochs 4 \
    --per_device_train_batch_size 2 \
    --lora_rank 8 \
    --lora_alpha 16 \
    --target_modules all-linear \
    --gradient_accumulation_steps 1 \
    --eval_steps 10 --save_steps 10 --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 512 \
    --truncation_strategy left \
    --output_dir output \
    --warmup_ratio 0.25 \
    --dataloader_num_workers 4 \
    --system 'You are helpful. #1' \
    --deepspeed zero2
