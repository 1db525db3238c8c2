"""nanoGPT's CPU quickstart, on the same text: tiny Shakespeare by bytes, 64 of context, 0.78 M parameters (nanoGPT's has 0.80 M).

Short, to reach the loss at which nanoGPT's ends (1.88) in the least time; for a better one: --max_steps=1500 --eval_interval=300

    python prepare.py tinyshakespeare.txt --tokenizer=bytes --out=data/shakespeare
    python train.py config/shakespeare.py
"""
data = "data/shakespeare"
block_size = 64
n_layer = 2  # few and wide: as good in as many tokens, and quicker
n_head = 4
n_embd = 160
intermediate_size = 512
batch_tokens = 24 * block_size
max_steps = 104
eval_interval = 104
learning_rate = 0.08
embed_lr = 0.1
momentum = 0.85
warmup_steps = 3
sample_tokens = 300
