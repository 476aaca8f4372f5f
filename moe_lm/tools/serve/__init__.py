"""OpenAI's HTTP interface with continuous batching, and a chat page.

Reading order: server, app, endpoints, requests, scheduler, answers, errors, limits, connections, metrics.
"""
