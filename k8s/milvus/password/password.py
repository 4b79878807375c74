"""Replace the password that every new Milvus has by the one of the Secret, once."""

import sys
from pathlib import Path

from pymilvus import MilvusClient, MilvusException

uri, secret = sys.argv[1], Path(sys.argv[2])
user, _, password = secret.read_text(encoding="utf-8").strip().partition(":")
if not password:
    sys.exit(f"{secret}: must hold USER:PASSWORD")
try:
    MilvusClient(uri, user=user, password=password).list_users()
    sys.stdout.write("the password is set\n")
except MilvusException:
    first = MilvusClient(uri, user="root", password="Milvus")
    first.update_password(user_name=user, old_password="Milvus", new_password=password)
    sys.stdout.write("the password was changed\n")
