"""Statements and photographs."""
