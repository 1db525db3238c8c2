"""What `make quickstart` trains: a small GPT on the source of the Python standard library, in minutes on two CPU cores.

    python prepare.py
    python train.py config/quickstart.py
"""
data = "data/python"
block_size = 256
n_layer = 4
n_head = 3
n_embd = 64 * n_head
batch_tokens = 8 * block_size
max_steps = 480  # 1.0 M tokens: less than a third of an epoch
learning_rate = 0.04
momentum = 0.85
eval_interval = 120
sample_prompt = "def main("
sample_tokens = 150
