"""A solution of E6."""
import model

PREDICT = {
    "width 32: FLOPs per byte with bytes / with a BPE of 4,096": 5,
    "width 576: the same": 5,
    "width 32: the vocabulary with the fewest FLOPs per byte": 4096,
}
EXPLAIN = ["The head is most of a small model.", "Sequences are shorter, too.", "As the first."]


def bytes_per_token(text, tokenizer):
    return len(text) / len(tokenizer.encode(text))


def flops_per_byte(width, vocab_size, length, context_bytes):
    context = context_bytes
    if vocab_size > 256:
        context = max(16, 16 * round(context_bytes / length / 16))
    config = model.Config(vocab_size, context, width)
    return config.flops_per_token() / length


def cheapest(width, lengths, context_bytes):
    def cost(size):
        return flops_per_byte(width, size, lengths[size], context_bytes)
    return min(lengths, key=cost)
