"""GPT-2's smallest size as its paper has it, trained by AdamW: to compare with.

    python prepare.py YOUR_TEXT --tokenizer=gpt2 --out=data/web    # 10 B tokens of the web, or llm.c's shards as they lie
    python train.py config/gpt2_124m.py                            # one GPU
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py       # eight: the same batches, cut in eight

To compare with: llm.c reports a validation loss of 3.29 for this size over 10 B tokens of FineWeb. The settings are close to its, not checked one by
one against its script; this file was not run to its end here.
"""
data = "data/web"
vocab_size = 50304  # GPT-2's 50,257, up to a multiple of 64
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
norm = "layer"
positions = "learned"
mlp = "gelu"
bias = True
qk_norm = False
tie_embeddings = True
optimizer = "adamw"
batch_tokens = 512 * block_size  # 0.5 M
max_steps = 19_073  # 10 B tokens
learning_rate = 6e-4
min_lr = 0.0
warmup_steps = 700
weight_decay = 0.1
eval_interval = 250
eval_tokens = 10 * 2**20
