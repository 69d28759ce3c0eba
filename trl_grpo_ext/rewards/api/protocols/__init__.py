"""The protocols of reward services: how each is asked, and how its replies are read."""

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.table import PROTOCOLS, make_protocol

__all__ = ["PROTOCOLS", "ServiceProtocol", "make_protocol"]
