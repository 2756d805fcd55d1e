"""Speed, measured: kernels against what the machine can do, models against the paper's protocol.

shapes          real models' shapes, by name
random_weights  packed weights of these shapes, made in memory
roof            what the machine can do at most, measured in the same run
kernels         each op x shape x rows, against its roof
attention       attention over KV4, KV8 and bf16 side by side, and beside torch's
ablation        linears that dequantize and leave the product to torch
throughput      prefill and decode of a whole model through the engine
latency         one batch through the engine, step by step
crossover       one linear against torch's products
prompts, load   what a load test asks; the client that asks it
serving         what came of it, in figures        serving_picture   and in a picture
"""
