"""Operators without a kernel of their own, compiled through Relax as islands."""
