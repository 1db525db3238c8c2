"""What `make quickstart` trains: a small GPT on the source of the Python standard library, in minutes on two CPU cores.

    python prepare.py
    python train.py config/quickstart.py
"""
data = "data/python"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256
batch_tokens = 32 * block_size
max_steps = 100
