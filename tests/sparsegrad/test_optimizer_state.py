"""What the adapters put into an optimizer's state dict."""

import torch
from tiny import adapted, train

from peft_sparsegrad.sparsegrad.optimizer_state import KEY


def test_a_state_dict_adds_nothing_to_the_optimizer_itself():
    """Not either where an adapter that is not active has left its part there, to be taken later."""
    model = adapted(warmup_steps=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    train(model, steps=3, optimizer=optimizer)
    optimizer.param_groups[0][KEY] = {"99 of another adapter": {}}
    saved = optimizer.state_dict()["param_groups"][0][KEY]
    assert optimizer.param_groups[0][KEY] == {"99 of another adapter": {}}
    assert saved.keys() > {"99 of another adapter"}
