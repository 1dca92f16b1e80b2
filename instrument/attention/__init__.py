"""Capturing attention: what each attention function of a model was given, without changing it.

Four tiers, the first that shows a call of a module wins: `interface` (transformers' attention interface), `mha`
(nn.MultiheadAttention), `sdpa` (direct users of scaled_dot_product_attention), `softmax` (models that materialise the weights).
"""
