"""What alembic runs for each command: migrates over the connection that `storage/database.py` hands it."""

from alembic import context

from headgate.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
