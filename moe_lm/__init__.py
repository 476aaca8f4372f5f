"""moe-lm: Mixture-of-Experts language models, from a tokenizer to samples, from a laptop to a cluster.

The walk, in reading order. A file imports only from rooms above its own in this list:

    common/      errors, files that appear whole, signals, the terminal
    config/      every setting and its checks
    text/        documents out of text, JSON lines, Parquet and data sets of the hub
    tokenizer/   train, load and measure a tokenizer; chat templates and their loss masks
    data/        token shards, the batch of step N, conversations and preference pairs as rows
    model/       the equations, on one device
    kernels/     what computes an equation faster on some device, put in its place from outside
    objective/   what is minimised: next tokens, preferences, balance
    optim/       parameter groups, schedules, Muon, LAMB, the router-bias update
    parallel/    ranks and meshes, and expert parallelism, put in its place from outside
    engine/      micro-batches become a step: one interface, two engines
    checkpoint/  the checkpoint folder: written, verified, read by rows
    generate/    cached decoding, sampling, beams, chat
    evaluate/    perplexity, bits per byte and tasks
    train/       the loop, and the recipes that pretraining and fine-tuning bring to it
    tools/       beside the walk, which imports none of them: verify, interop, serve, report, quickstart, doctor
    cli/         the verbs; `__main__` starts them

docs/tour.md follows one token and one optimizer step through these rooms.
"""

__version__ = "0.1.0"
