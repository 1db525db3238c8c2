"""nanoGPT's CPU quickstart, on the same text: tiny Shakespeare by bytes, 64 of context, 0.87 M parameters (nanoGPT's has 0.80 M).

    python prepare.py tinyshakespeare.txt --tokenizer=bytes --out=data/shakespeare
    python train.py config/shakespeare.py
"""
data = "data/shakespeare"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
intermediate_size = 352  # of swiglu: about 8/3 n_embd
batch_tokens = 24 * block_size
max_steps = 1000
eval_interval = 200
learning_rate = 0.04
sample_tokens = 300
