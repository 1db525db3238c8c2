"""A model for one 80 GB GPU and one day.

    python prepare.py YOUR_TEXT --tokenizer=gpt2 --out=data/web    # some 10 B tokens
    python train.py config/one_gpu_one_day.py
    python train.py config/one_gpu_one_day.py --resume             # after an interruption: the clock goes on where its checkpoint stood
    torchrun --nproc_per_node=8 train.py config/one_gpu_one_day.py --time_budget=3h

Projected, not measured: 6 N + attention is 3.4 GFLOP a token, so an H100 (989 TFLOP/s) at 40 % MFU sees 10 B tokens in 24 hours.
"""
data = "data/web"
vocab_size = 50304
block_size = 2048
depth = 20  # 1,280 wide, steps of a million tokens; budget.py has the formulas
time_budget = "24h"
schedule = "trapezoid"
eval_tokens = 10 * 2**20
checkpoint_interval = "30m"
