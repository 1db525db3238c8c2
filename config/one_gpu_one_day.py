"""A model for one 80 GB GPU and one day.

    python prepare.py YOUR_TEXT --tokenizer=gpt2 --out=data/web    # some 10 B tokens
    python train.py config/one_gpu_one_day.py
    torchrun --nproc_per_node=8 train.py config/one_gpu_one_day.py

Projected, not measured: 6 N + attention is 3.4 GFLOP a token, so an H100 (989 TFLOP/s) at 40 % MFU sees 10 B tokens in 24 hours.
"""
data = "data/web"
vocab_size = 50304
block_size = 2048
n_layer = 20
n_embd = 64 * n_layer
n_head = n_embd // 128
batch_tokens = 256 * block_size  # 0.5 M
max_steps = 10_000_000_000 // batch_tokens
learning_rate = 0.02
schedule = "trapezoid"
warmup_steps = 40
head_lr = 0.004
weight_decay = 0.05
eval_interval = 500
eval_tokens = 10 * 2**20
checkpoint_interval = "30m"
